"""Models built on the recurrent modules. Nothing below this package imports it."""

from .language_model import LanguageModel
from .sampling import generate, next_token_probabilities

__all__ = ["LanguageModel", "generate", "next_token_probabilities"]
