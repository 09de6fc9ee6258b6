"""Publishing a CLT on the Hugging Face Hub: the generated model card, the push, and code for the repository."""

from .background import BackgroundPush
from .card_files import card_from_folder, save_model_card, update_card
from .model_card import build_model_card, is_human_edited
from .push import check_push_access, push_folder, push_to_hub


__all__ = [
    "BackgroundPush",
    "build_model_card",
    "card_from_folder",
    "check_push_access",
    "is_human_edited",
    "push_folder",
    "push_to_hub",
    "save_model_card",
    "update_card",
]
