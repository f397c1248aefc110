"""The four maps as the backbone of a detector: Mask R-CNN with a feature pyramid takes a training step."""

from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import gcvit.model  # noqa: F401  registers the variants with timm


class PyramidBackbone(nn.Module):
    """Images to a pyramid of equally wide maps at strides 4, 8, 16, 32, and 64."""

    def __init__(self, features: nn.Module, out_channels: int):
        super().__init__()
        self.features, self.out_channels = features, out_channels
        self.pyramid = FeaturePyramidNetwork(features.feature_info.channels(), out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.features(images)
        return self.pyramid(OrderedDict((str(i), x) for i, x in enumerate(maps)))


def test_mask_rcnn_takes_a_training_step() -> None:
    torch.manual_seed(0)
    # Made for 64 x 64, as pretrained weights are for 224 x 224; the pictures below are of other sizes.
    sizes = {"width": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
    features = timm.create_model("gc_vit_xxtiny", features_only=True, img_size=64, drop_path_rate=0.0, **sizes)
    # The detector scales the shorter side to 96 pixels: a batch of 96 x 160 here.
    detector = MaskRCNN(
        PyramidBackbone(features, out_channels=16),
        num_classes=3,
        min_size=96,
        max_size=160,
        rpn_batch_size_per_image=16,
        box_batch_size_per_image=16,
    ).train()
    boxes = torch.tensor([[10.0, 12.0, 60.0, 70.0], [50.0, 5.0, 110.0, 40.0]])
    images = [torch.rand(3, 80, 120), torch.rand(3, 60, 100)]
    targets = []
    for image in images:
        height, width = image.shape[1:]
        inside = boxes.clamp(max=min(height, width) - 1)
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, inside.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": inside, "labels": torch.tensor([1, 2]), "masks": masks})

    sides = set()
    features.register_forward_pre_hook(lambda module, inputs: sides.add(tuple(inputs[0].shape[2:])))
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    before = features.model.stem.conv.weight.detach().clone()
    losses = detector(images, targets)
    assert {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"} == losses.keys()
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert sides == {(96, 160)}
    assert not torch.equal(features.model.stem.conv.weight, before)
    without_gradient = {name for name, p in features.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without_gradient

    detector.eval()
    with torch.no_grad():
        (found,) = detector([torch.rand(3, 90, 50)])
    assert found["masks"].shape[1:] == (1, 90, 50)
