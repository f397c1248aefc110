"""The recipe beside timm's own parts: 100 steps of the same loss, learning rate and moving average.

On one side stand our model, schedule, augmentation on the device, loss, AdamW groups, clipping and EMA; on
the other timm's `gcvit_xxtiny` (its weights mapped), CosineLRScheduler, Mixup, SoftTargetCrossEntropy,
param_groups_weight_decay and ModelEmaV3 around PyTorch's plain AdamW and `clip_grad_norm_`. Both see the same
images and draws.

The models run in float64. Some gradients are zero in exact arithmetic (softmax ignores the bias of the keys),
and what stands in their place is rounding noise, which Adam divides by its own size: in float32 it exceeds
eps, so that two right programs walk apart by whole learning rates within a few steps. In float64 it lies far
below eps, and 100 steps stay comparable. Images and targets are float32, as in a run.
"""

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.data import mixup as timm_mixup
from timm.layers import DropPath as TimmDropPath
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from gcvit.config.schema import AugmentConfig, DataConfig, MixConfig, OptimConfig, ScheduleConfig
from gcvit.data.batch import Batch
from gcvit.data.transforms import DeviceAugment, normalize
from gcvit.model import create_model, weights
from gcvit.model.gcvit import GCViT
from gcvit.model.layers import DropPath
from gcvit.optim.adamw import build_adamw, create_moments, decays, set_lr
from gcvit.optim.clip_grad import clip_and_step, global_norm
from gcvit.optim.loss import soft_target_loss
from gcvit.optim.lr_schedule import build_schedule
from gcvit.parallel.engine import Fragment
from gcvit.training.ema import Ema
from tests.helpers.streaming import whole_batch

NUM_STEPS, BATCH_SIZE, IMG_SIZE, NUM_CLASSES = 100, 4, 64, 10
DROP_PATH = 0.2
# The published recipe, shortened: 10 steps of warm-up in 90 of cosine, 10 at the floor. The peak is a tenth of the
# published one, which belongs to a batch of thousands.
OPTIM = OptimConfig(lr=5e-4, warmup_lr=1e-6, min_lr=5e-6, weight_decay=0.05, decay_bias_tables=False, clip_norm=5.0)
SCHEDULE = ScheduleConfig(cosine="90 steps", warmup="10 steps", cooldown="10 steps")
AUGMENT = AugmentConfig(rand_augment=None, erase_prob=0, mix=MixConfig(group_size=2), label_smoothing=0.1)
EMA_DECAY = 0.9


def build_models(width: int = 64) -> tuple[GCViT, nn.Module]:
    common = {"num_classes": NUM_CLASSES, "img_size": IMG_SIZE, "drop_path_rate": DROP_PATH}
    ours = create_model("gc_vit_xxtiny", width=width, **common)
    ours.init_weights(seed=0)
    theirs = timm.create_model("gcvit_xxtiny", embed_dim=width, **common)
    theirs.load_state_dict(weights.to_timm_state(ours.state_dict()))
    for module in theirs.modules():
        if hasattr(module, "rel_pos"):  # timm's d^-0.5 is a double, the official one and ours is rounded to fp32
            module.scale = ours.stages[0].blocks[0].attention.scale
    for module in list(theirs.modules()):
        for name, child in module.named_children():
            if isinstance(child, TimmDropPath):  # the same, drawn with another function of the generator
                setattr(module, name, DropPath(child.drop_prob))
    return ours.double().train(), theirs.double().train()


@pytest.mark.parametrize("decay_bias_tables", [True, False])
def test_decay_groups_are_timms(decay_bias_tables):
    """timm exempts the bias tables, the published run does not: the one named choice, and no other
    difference."""
    ours, theirs = build_models()
    exempt = () if decay_bias_tables else theirs.no_weight_decay()
    groups = param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=exempt)
    name_of = {id(p): name for name, p in theirs.named_parameters()}
    expected = {name_of[id(p)]: group["weight_decay"] > 0 for group in groups for p in group["params"]}
    got = {
        weights.to_timm(name): decays(name, p.shape, decay_bias_tables=decay_bias_tables)
        for name, p in ours.named_parameters()
    }
    assert got == expected
    assert any("bias_table" in name and decay for name, decay in got.items()) == decay_bias_tables


def draw_batch(step: int) -> Batch:
    """Noise with a colour per class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    images = torch.randint(0, 128, (BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE), dtype=torch.uint8, generator=generator)
    images += (labels[:, None] * torch.tensor([3, 7, 11]) % 10 * 12).to(torch.uint8)[:, :, None, None]
    return whole_batch(images, labels, torch.arange(BATCH_SIZE), torch.zeros(BATCH_SIZE, 5, dtype=torch.int64))


class Ours:
    def __init__(self, model: GCViT):
        self.model, self.parameters = model, dict(model.named_parameters())
        parameters = ((n, tuple(p.shape), p) for n, p in self.parameters.items())
        self.optimizer = build_adamw(parameters, OPTIM, model.find_layers())
        create_moments(self.optimizer)
        self.schedule = build_schedule(SCHEDULE, OPTIM, global_batch_size=BATCH_SIZE, samples_per_epoch=1000)
        half_life = BATCH_SIZE * np.log(0.5) / np.log(EMA_DECAY)
        fragments = {n: Fragment(p.detach().view(-1), 0, p.shape) for n, p in self.parameters.items()}
        self.ema = Ema(fragments, half_life_samples=half_life, global_batch_size=BATCH_SIZE)
        self.augment = DeviceAugment(AUGMENT, DataConfig(), NUM_CLASSES, seed=7)

    def step(self, step: int) -> tuple[float, float]:
        images, targets = self.augment(draw_batch(step), step, torch.device("cpu"))
        loss = soft_target_loss(self.model(images.double()), targets).sum() / BATCH_SIZE
        loss.backward()
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        set_lr(self.optimizer, self.schedule.lr(step))
        clip_and_step(self.optimizer, grads, global_norm(grads), OPTIM.clip_norm)
        self.optimizer.zero_grad()
        self.ema.update()
        return loss.item(), self.optimizer.param_groups[0]["lr"]


class Timms:
    def __init__(self, model: nn.Module):
        self.model = model
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        self.optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(0.9, 0.999), eps=1e-8, foreach=False)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=90,
            lr_min=5e-6,
            warmup_t=10,
            warmup_lr_init=1e-6,
            warmup_prefix=False,
            t_in_epochs=False,
        )
        self.ema = ModelEmaV3(model, decay=EMA_DECAY)
        self.mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
        self.loss = SoftTargetCrossEntropy()

    def step(self, step: int, draws: DeviceAugment, monkeypatch) -> tuple[float, float]:
        batch = draw_batch(step)
        images = normalize(batch.images, DataConfig().mean, DataConfig().std)
        images, targets = self.mix(images, batch.labels, step, draws, monkeypatch)
        loss = self.loss(self.model(images.double()), targets)
        loss.backward()
        self.scheduler.step_update(step)
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        return loss.item(), self.optimizer.param_groups[0]["lr"]

    def mix(
        self, images: Tensor, labels: Tensor, step: int, draws: DeviceAugment, monkeypatch
    ) -> tuple[Tensor, Tensor]:
        """timm's own Mixup on each pair, with our generator in the place of NumPy's."""
        mixed, targets = [], []
        for group in range(BATCH_SIZE // 2):
            rng = draws._group_rng(step, group)
            with monkeypatch.context() as patch:
                for theirs, ours in (("rand", "random"), ("beta", "beta"), ("randint", "integers")):
                    patch.setattr(timm_mixup.np.random, theirs, getattr(rng, ours))
                rows = slice(2 * group, 2 * group + 2)
                x, y = self.mixup(images[rows].clone(), labels[rows])
            mixed.append(x)
            targets.append(y)
        return torch.cat(mixed), torch.cat(targets)


@pytest.mark.parametrize("width", [32, pytest.param(64, marks=pytest.mark.slow)])  # 64 is the published one
def test_a_hundred_steps_are_timms(width, monkeypatch):
    models = build_models(width)
    ours, theirs = Ours(models[0]), Timms(models[1])
    assert ours.schedule.total_steps == NUM_STEPS
    losses, rates = [], []
    for step in range(NUM_STEPS):
        torch.manual_seed(step)  # of drop path, which both draw in the same order
        mine = ours.step(step)
        torch.manual_seed(step)
        other = theirs.step(step, ours.augment, monkeypatch)
        losses.append((mine[0], other[0]))
        rates.append((mine[1], other[1]))
    np.testing.assert_allclose(*np.array(losses).T, rtol=1e-6)
    np.testing.assert_allclose(*np.array(rates).T, rtol=1e-6)
    assert np.mean([mine for mine, _ in losses[-10:]]) < np.mean([mine for mine, _ in losses[:10]]) - 0.1

    average = weights.to_timm_state({name: part.data.view(part.shape) for name, part in ours.ema.fragments.items()})
    reference = dict(theirs.ema.module.named_parameters())
    assert average.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.linalg.vector_norm(average[name] - tensor) <= 1e-6 * torch.linalg.vector_norm(tensor), name
