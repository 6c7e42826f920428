"""What a user of `PrefixCache` can do where nothing is cached: the ends of some reasons.

`layerwise.fit` leaves them out (`without_remedies`): it has no such option, and its plan says what is frozen.
"""

STORE_VIEWS = ". A PrefixCache with views=V stores V draws of each sample"
FREEZE_BEFORE = ". Freeze the groups before it, and hold them in eval mode (layerwise.Tuner does both)."


def without_remedies(reason: str) -> str:
    """Return a reason without what can be done about it.

    >>> without_remedies("off: samples are random. A PrefixCache with views=V stores V draws of each sample")
    'off: samples are random'
    """
    for remedy in (STORE_VIEWS, FREEZE_BEFORE):
        reason = reason.replace(remedy, "")
    return reason
