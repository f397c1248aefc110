"""The soft-target loss beside PyTorch's."""

import torch

from gcvit.optim.loss import soft_target_loss


def test_each_samples_loss_and_gradient_are_pytorchs():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(7, 11, generator=generator)
    targets = torch.rand(7, 11, generator=generator)
    targets /= targets.sum(1, keepdim=True)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = soft_target_loss(ours, targets)
    expected = torch.nn.functional.cross_entropy(theirs, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_bf16_logits_are_summed_in_fp32():
    """Over 1000 classes a sum in bf16, which has 8 bits, would be percents off."""
    logits = torch.randn(16, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.nn.functional.one_hot(torch.arange(16), 1000) * 0.9 + 0.1 / 1000
    losses = soft_target_loss(logits, targets)
    assert losses.dtype == torch.float32
    exact = torch.nn.functional.cross_entropy(logits.double(), targets.double(), reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)


def test_an_all_zero_target_costs_and_pulls_nothing():
    """So a rank without samples takes part in a step."""
    logits = torch.randn(1, 5, requires_grad=True)
    loss = soft_target_loss(logits, torch.zeros(1, 5)).sum()
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(1, 5))


def test_no_samples():
    assert soft_target_loss(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)
