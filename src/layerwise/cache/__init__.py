"""The frozen prefix, computed once: cut, replay, store.

The mechanism, in the order in which to read it:

- `cutting.dirty`: what a forward pass makes anew in each epoch;
- `cutting.search`: which calls can be skipped, and what is to be kept of them;
- `replay.capturing`: the model's own forward up to the cut;
- `replay.ghost`: tensors without data, in place of what is not kept;
- `replay.replaying`: the model's own forward without what is before the cut;
- `proof.outputs`: that a replayed batch is the plain one.

What stands beside it, each for itself:

- `cutting`: calls and values by name (`cut`, `doors`), what must run though it is not dirty (`guards`), and
  the cuts of a model in this phase and the next (`book`);
- `replay`: how calls are seen (`intercepting`, `hooks`), what skipped calls give for every batch alike
  (`fixed`), ghosts of a batch that a loop may read (`handed`), how a batch comes to the model (`link`) and
  lies in memory (`layout`);
- `proof`: that samples do not touch each other (`mixing`), to the last bit (`evenness`), and that no backward
  pass needs what was skipped (`checkpoints`).

What it works on:

- `changes`: whether a data set (`datawatch`) or a model (`modelstate`) is what it was;
- `samples`: a loader read by index in its own order (`reading`), whether that draws (`draws`), its samples
  sorted by shape (`supply`), and what is stored of those of one shape (`feed`);
- `store`: memory and files (`column`, `shelf`), and whether caching pays (`decision`).

How it comes together: users call `prefix`; `dealing` makes an epoch's batches (each a `live` one until the
loop is done with it), `calls` sees them reach the model, `observing` looks at the first one of a phase,
`frozen` runs the frozen part, `stock` keeps what it gives, and `telling` says what became of it. `filling`
and `folding` are a recording pass of its own.

Each folder imports only from those that `tests/unit/test_imports.py` lists before it.
"""
