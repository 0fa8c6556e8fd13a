"""The pretended GPU's own rules (tools/pretend_gpu): it minds what a real one refuses, or lets go wrong."""

from __future__ import annotations

import gpu_case
import pytest
import torch

pytestmark = [*gpu_case.marks(), gpu_case.counted]


def minded() -> str:
    import emulate

    return "\n".join(emulate.complaints())


def test_two_streams_that_do_not_wait_are_a_race():
    x = torch.zeros(64, device="cuda")
    torch.cuda.synchronize()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        x.add_(1)
    two.wait_stream(one)
    with torch.cuda.stream(two):
        x.add_(1)
    assert not minded()
    with torch.cuda.stream(one):
        x.add_(1)
    assert "race" in minded()


def test_memory_given_to_another_stream_too_soon_is_a_race():
    """torch's allocator hands a freed tensor's memory to its own stream; another that still reads it must
    have been recorded."""
    side = torch.cuda.Stream()
    for recorded in (True, False):
        x = torch.zeros(1 << 20, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            kept = x.sum()
        if recorded:
            x.record_stream(side)
        place = x.data_ptr()
        del x
        y = torch.ones(1 << 20, device="cuda")
        assert recorded or y.data_ptr() == place
        assert ("race" in minded()) is not recorded
        torch.cuda.synchronize()
        del y, kept
        torch.cuda.empty_cache()


def test_pageable_memory_breaks_a_capture():
    x = torch.zeros(8, device="cuda")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.capture_begin()
        with pytest.raises(RuntimeError):
            x.copy_(torch.ones(8), non_blocking=True)
        with pytest.raises(RuntimeError):
            graph.capture_end()
    assert "pageable memory in a capture" in minded()


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_waiting_for_the_device_breaks_a_capture(mode):
    x = torch.zeros(8, device="cuda")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode=mode)
        x.add_(1)
        with pytest.raises(RuntimeError):
            torch.cuda.synchronize()
        with pytest.raises(RuntimeError):
            graph.capture_end()
    assert "breaks the capture" in minded()


def test_a_kernel_for_another_device_than_the_current_one_is_refused():
    from fastphi.triton_kernels import fused_layer

    with torch.cuda.device(1):
        r = torch.zeros(1, 4, 4, 16, device="cuda:1")
        s, out = torch.ones(1, device="cuda:1"), torch.zeros(1, 4, 4, 16, device="cuda:1")
        weight = fused_layer.pack_weight(torch.zeros(16, 16, 3, 3, device="cuda:1"), None, r.dtype)
        fused_layer.fused_layer_fwd(r, s, weight, None, None, r_out=out)
    with pytest.raises(RuntimeError, match=r"tensors of device \[1\], and device 0 is current"):
        fused_layer.fused_layer_fwd(r, s, weight, None, None, r_out=out)


def test_copies_and_waits_are_counted():
    x = torch.zeros(8, device="cuda")
    gpu_case.counts()
    x.copy_(torch.ones(8))
    x.copy_(torch.ones(8).pin_memory(), non_blocking=True)
    x.sum().item()
    found = gpu_case.counts()
    assert found["copy pageable2d"] == 1 and found["copy pinned2d"] == 1
    assert found["synchronize"] == 2 and found["emulated"] == 1
