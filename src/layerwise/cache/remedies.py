"""What a user of `PrefixCache` can do where nothing is cached: the ends of some reasons.

`layerwise.fit` leaves them out (`without_remedies`): it has no such option, and its plan says what is frozen.
"""

STORE_VIEWS = ". A PrefixCache with views=V stores V draws of each sample"
CALL_IT = (
    ". What comes before the model, or between its parts, belongs into the data set, or into the forward of "
    "a module around the model: give the cache that module, and call it"
)
LET_IT_LEARN = (
    ". What the loop moves by itself (a momentum encoder) is left out of the prefix if it requires gradients"
)
KEEP_APART = ". Keep what no forward pass reads outside of the model"
FREEZE_BEFORE = ". Freeze the groups before it, and hold them in eval mode (layerwise.Tuner does both)."
STORE_ELSEWHERE = '. Make room there, or name another folder=, or pass storage="memory"'

MOVE_HOOK = (
    ". Set the hook behind the frozen part, or remove it (that of transformers' gradient checkpointing: "
    "model.disable_input_require_grads() when training begins)."
)


def without_remedies(reason: str) -> str:
    """Return a reason without what can be done about it.

    >>> without_remedies("off: samples are random. A PrefixCache with views=V stores V draws of each sample")
    'off: samples are random'
    """
    remedies = STORE_VIEWS, CALL_IT, LET_IT_LEARN, KEEP_APART, FREEZE_BEFORE, MOVE_HOOK, STORE_ELSEWHERE
    for remedy in remedies:
        reason = reason.replace(remedy, "")
    return reason
