"""The frozen prefix, computed once: cut, replay, store.

The mechanism, in the order in which to read it:

- `cutting`: what a forward pass makes anew in each epoch (`dirty`), which calls can be skipped and what is to
  be kept of them (`search`, told by `doors`), and the cuts of a model in this phase and the next (`book`);
- `replay`: the model's own forward up to the cut (`capturing`) and without what is before it (`replaying`),
  what skipped calls give for every batch alike (`fixed`), tensors without data (`ghost`), how a batch comes
  to the model (`link`) and lies in memory (`layout`);
- `proof`: that samples do not touch each other (`mixing`, `companions`), to the last bit (`evenness`), and
  that a replayed batch is the plain one (`outputs`).

What it works on:

- `changes`: whether a data set (`datawatch`) or a model (`modelstate`) is what it was;
- `samples`: a loader read by index (`reading`) in its own order (`order`), whether that draws (`draws`), its
  samples sorted by shape (`supply`), what is stored of those of one shape (`feed`), and what is known of them
  in one state of the model (`phase`);
- `store`: memory and files (`column`, `shelf`), and whether caching pays (`decision`).

How it comes together: users call `prefix`; `dealing` makes an epoch's batches, `calls` sees them reach the
model, `observing` looks at the first one of a phase, `frozen` runs the frozen part, `stock` keeps what it
gives, and `telling` says what became of it. `filling` and `folding` are a recording pass of its own.

Each folder imports only from those that `tests/unit/test_imports.py` lists before it.
"""
