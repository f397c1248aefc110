"""The record of a step: `tests/parity/test_step_trace.py` compares it with real tensors'."""

import torch

from gcvit.planning.step_trace import Recorder


def test_the_recorder_sees_what_comes_and_goes_and_views_are_nothing_new():
    x = torch.ones(10)
    with Recorder({x.untyped_storage()._cdata}) as recorder:
        y = x * 2
        y.view(2, 5).add_(1)
        recorder.mark("here")
        del y
        _z = x[:5] + 1
    assert [(event.num_bytes, event.what) for event in recorder.events] == [(40, ""), (0, "here"), (-40, ""), (20, "")]
