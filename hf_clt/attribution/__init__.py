"""Attribution graphs: which features, errors and tokens a next token comes from, exactly, on one prompt."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "AttributionGraph": "graph",
        "FeatureTarget": "graph",
        "TokenTarget": "graph",
        "attribute": "tracing",
        "freeze": "frozen",
    },
)
