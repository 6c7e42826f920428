"""The frozen prefix, computed once: cut, replay, store.

Where to read on:

- What users call: `prefix`. In it, `dealing` makes an epoch's batches, `calls` sees them reach the model.
- Samples: `reading` (a loader by index), `prepared` (one of Accelerate's), `alike` (one made anew), `opening`
  (may it be cached?), `supply` (its samples, sorted by shape), `feed` (what is stored of one shape),
  `batchshape`, `datawatch` (was the data set changed?), `contents` (what a data set holds).
- Cut: `cut` (which calls to skip, what to keep of them), told by `dirty` (operations that change) and `doors`
  (what a call takes and gives); `source` (what a value is made of), `cutbook` (cuts, by the model's state),
  `settings` (was an attribute of the model changed?).
- Replay: `replay` (calls answered from the store), `ghost` (tensors without data), `link` (how a batch
  reaches the model), `hooks`.
- Values: `frozen` (runs the frozen part, stores what it gives), `live` (a batch that was handed out).
- Proof, on the first batch of a phase: `observing`, `proving`, `checking`, `companions` (samples beside
  strange ones), `evenness` (last bits), `layout` (how a value is made of samples).
- Store: `stock` (budget, sharing), `decision` (does it pay?), `room` (memory, disk), `store` (one column),
  `shelf` (files), `fingerprint` (names).
- A recording pass of its own: `filling`, `folding` (batch-norms).
"""
