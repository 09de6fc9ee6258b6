"""Publishing a CLT on the Hugging Face Hub: the generated model card and the push."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "BackgroundPush": "background",
        "build_model_card": "card",
        "card_from_folder": "card",
        "check_push_access": "push",
        "is_human_edited": "card",
        "push_folder": "push",
        "push_to_hub": "push",
        "save_model_card": "card",
        "update_card": "card",
    },
)
