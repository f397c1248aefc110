"""Define GC ViT. Importing this package registers all variants with timm."""

from gcvit.model.gcvit import GCViT
from gcvit.model.variants import VARIANTS, Variant, create_model

__all__ = ["VARIANTS", "GCViT", "Variant", "create_model"]
