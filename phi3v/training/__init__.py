"""Flags to a trained folder: what a recipe imports."""

from .arguments import RecipeParser
from .launch import trainer_arguments
from .loading import load_model, load_processor
from .trainer import Phi3VTrainer, Result

__all__ = [
    "Phi3VTrainer",
    "RecipeParser",
    "Result",
    "load_model",
    "load_processor",
    "trainer_arguments",
]
