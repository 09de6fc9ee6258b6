"""Attribution graphs: which features, errors and tokens a next token comes from, exactly, on one prompt."""

from ..lazy import lazy_names


__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AttributionGraph": "graph",
        "FeatureTarget": "graph",
        "TokenTarget": "graph",
        "attribute": "tracing",
        "freeze": "frozen",
    },
)

__all__ = ["AttributionGraph", "FeatureTarget", "TokenTarget", "attribute", "freeze"]
