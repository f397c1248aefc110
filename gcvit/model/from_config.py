"""Build a model from the model section of a config. No other module of this package imports configs."""

from gcvit.config.schema import ModelConfig
from gcvit.model import GCViT, create_model


def build_model(model: ModelConfig) -> GCViT:
    """Build the bare model that a config names.

    Raises:
        UserError: The name or an override is unknown.
    """
    return create_model(
        model.name,
        num_classes=model.num_classes,
        img_size=model.img_size,
        drop_path_rate=model.drop_path,
        drop_path_skips=model.drop_path_skips,
        attention=model.attention,
        **(model.overrides.model_dump(exclude_none=True) if model.overrides else {}),
    )
