"""The table of GPUs: what stands in it fits together, and names are found."""

import pytest

from gcvit.errors import UserError
from gcvit.runtime.gpu_specs import DEVICES, find_device, get_device


def test_tensor_cores_are_faster_and_every_name_belongs_to_one_gpu():
    names = [name for device in DEVICES.values() for name in device.torch_names]
    assert len(names) == len(set(names))
    for device in DEVICES.values():
        assert device.peaks["fp16"] > 1.9 * device.peaks["fp32"], device.name
        assert device.peaks.get("bf16", device.peaks["fp16"]) == device.peaks["fp16"]
    assert "bf16" not in DEVICES["v100-32"].peaks


def test_a_gpu_is_found_by_what_pytorch_calls_it_and_a_slice_of_one_is_not():
    assert find_device("NVIDIA H100 80GB HBM3") is get_device("h100-80")
    assert find_device("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    assert find_device("cpu") is None


def test_peaks_are_dense():
    assert get_device("h100-80").peaks["bf16"] == pytest.approx(989.5e12)  # the sheet's 1,979 are with sparsity
    assert get_device("a100-40").peaks["bf16"] == 312e12


def test_an_unknown_gpu_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown GPU: got h100-8o; .*did you mean h100-80\?"):
        get_device("h100-8o")
