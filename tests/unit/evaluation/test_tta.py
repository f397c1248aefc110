"""Several views of an image: the model's inputs, and that probabilities are averaged."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import five_crop, pil_to_tensor, resize, ten_crop

from gcvit.config.schema import DataConfig, ModelConfig
from gcvit.data.transforms import EvalTransform
from gcvit.errors import UserError
from gcvit.evaluation.tta import Options, Views

WEIGHT = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(1))


def model(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1) @ WEIGHT[: images[0].numel()]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def mean_of(*logits: torch.Tensor) -> torch.Tensor:
    return torch.stack([one.softmax(1) for one in logits]).mean(0)


def test_one_look_is_the_model_itself(images):
    assert torch.equal(Views([model])(images), model(images))
    columns = torch.tensor([4, 0, 2])
    assert torch.equal(Views([model], columns=columns)(images), model(images)[:, columns])


def test_mirror_images(images):
    found = Views([model], flip=True)(images).exp()
    torch.testing.assert_close(found, mean_of(model(images), model(images.flip(3))))


def test_ten_crops_are_torchvision_s():
    """A picture that is wider than high; each crop is another place in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.save(buffer, "PNG")
    crops = EvalTransform(DataConfig(crop_pct=0.5), 8, five_crop=True)(buffer.getvalue())
    resized = resize(image, 16, Image.Resampling.BICUBIC)
    assert torch.equal(crops, torch.stack([pil_to_tensor(crop) for crop in five_crop(resized, 8)]))
    assert torch.equal(crops[4], EvalTransform(DataConfig(crop_pct=0.5), 8)(buffer.getvalue()))
    wanted = mean_of(*(model(pil_to_tensor(crop)[None] / 255) for crop in ten_crop(resized, 8)))
    batch = torch.cat([crops / 255, torch.zeros(5, 3, 8, 8)])  # and another image behind it
    found = Views([model], flip=True, five_crop=True)(batch).exp()
    assert found.shape == (2, 5)
    torch.testing.assert_close(found[:1], wanted)


def test_several_sizes(images):
    small = images[:, :, 2:6, 2:6]
    found = Views([model, model], flip=True)(images, small).exp()
    torch.testing.assert_close(found, mean_of(model(images), model(images.flip(3)), model(small), model(small.flip(3))))


def test_classes_compete_only_with_those_of_the_set(images):
    """Averaged over the set's classes alone: another class's share must not weigh a look down."""
    columns = torch.tensor([1, 3])
    found = Views([model], flip=True, columns=columns)(images).exp()
    torch.testing.assert_close(found, mean_of(model(images)[:, columns], model(images.flip(3))[:, columns]))


def test_a_broken_look_is_no_answer(images):
    images[0] = torch.nan
    found = Views([model], flip=True)(images)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


def test_options_say_how_images_are_prepared():
    card = DataConfig(crop_pct=0.9, eval_resize="squash")
    assert Options().prepare(card) == card
    given = Options(crop_pct=1.0, resize="crop").prepare(card)
    assert (given.crop_pct, given.eval_resize, given.mean) == (1.0, "crop", card.mean)
    assert Options().sizes_of(ModelConfig(name="gc_vit_tiny")) == (224,)
    assert Options(img_size=(256, 288)).sizes_of(ModelConfig(name="gc_vit_tiny")) == (256, 288)
    with pytest.raises(UserError, match="all the same"):
        Options(tta="ten-crop", crop_pct=1.0).prepare(card)
    Options(tta="ten-crop").prepare(card)


def test_tags_name_what_is_not_the_default():
    assert Options(batch_size=3, skip_corrupt=True).tags == []
    options = Options(img_size=(224, 256), crop_pct=0.95, resize="squash", tta="flip", precision="bf16")
    assert options.tags == ["224+256", "crop0.95", "squash", "flip", "bf16"]
