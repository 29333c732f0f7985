"""Time by category: of intervals and traces made by hand, and of a real profile."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

from titan_yulan.config.presets import PRESETS
from titan_yulan.monitor.breakdown import (
    ATTENTION,
    CATEGORIES,
    COMMUNICATION,
    ELEMENTWISE,
    HEAD,
    IDLE,
    MLP,
    OPTIMIZER,
    PROJECTIONS,
    Interval,
    Sizes,
    breakdown,
    category,
    intervals,
    read_trace,
    share_out,
)

SIZES = Sizes(tokens=64, intermediate=96, vocabulary=250)
HIDDEN = 32


def event(name: str, start: float, duration: float, kind: str = "cpu_op", thread: int = 1, **args: Any) -> dict:
    return {"name": name, "cat": kind, "ts": start, "dur": duration, "pid": 1, "tid": thread, "args": args}


def seconds(found: list[Interval], first: float, last: float) -> dict[str, float]:
    shared = share_out(found, (first, last))
    assert sum(shared.seconds.values()) == pytest.approx(shared.window) == last - first
    return {name: value for name, value in shared.seconds.items() if value}


def test_gaps_are_idle_and_the_window_cuts() -> None:
    found = [Interval(0, 2, MLP), Interval(5, 9, ATTENTION)]
    assert seconds(found, 1, 8) == {MLP: 1, ATTENTION: 3, IDLE: 3}
    assert seconds([], 0, 2) == {IDLE: 2}


def test_streams_share_the_time_in_which_both_compute() -> None:
    found = [Interval(0, 4, MLP), Interval(2, 6, ATTENTION), Interval(3, 4, MLP)]
    assert seconds(found, 0, 6) == pytest.approx({MLP: 2 + 0.5 + 2 / 3, ATTENTION: 0.5 + 1 / 3 + 2})


def test_communication_is_exposed_where_nothing_computes() -> None:
    found = [Interval(0, 5, COMMUNICATION), Interval(4, 7, COMMUNICATION), Interval(2, 3, MLP), Interval(6, 8, HEAD)]
    assert seconds(found, 0, 10) == {COMMUNICATION: 5, MLP: 1, HEAD: 2, IDLE: 2}
    assert share_out(found, (0, 10)).communication == 7


@given(
    st.lists(st.tuples(st.integers(-5, 40), st.integers(0, 15), st.sampled_from(CATEGORIES[:-1])), max_size=12),
    st.integers(1, 30),
)
def test_every_instant_is_counted_once(drawn: list[tuple[int, int, str]], last: int) -> None:
    """Against counting whole seconds one by one."""
    found = [Interval(start, start + length, name) for start, length, name in drawn]
    wanted = dict.fromkeys(CATEGORIES, 0.0)
    communicating = 0
    for instant in range(last):
        names = [interval.category for interval in found if interval.start <= instant < interval.end]
        computing = [name for name in names if name != COMMUNICATION]
        communicating += len(computing) < len(names)
        for name in computing or [COMMUNICATION if names else IDLE]:
            wanted[name] += 1 / (len(computing) or 1)
    shared = share_out(found, (0, last))
    assert shared.seconds == pytest.approx(wanted)
    assert shared.communication == communicating


def test_operators_count_without_what_they_call() -> None:
    events = [
        event("train_step", 0, 100, "user_annotation"),
        event("aten::linear", 10, 30, **{"Input Dims": [[2, 32, HIDDEN], [HIDDEN, HIDDEN], []]}),
        event("aten::mm", 15, 20, **{"Input Dims": [[64, HIDDEN], [HIDDEN, HIDDEN]]}),
        event("Optimizer.step#AdamW.step", 50, 40, "user_annotation"),
        event("aten::add", 60, 10),
        event("gloo:all_reduce", 65, 20, "user_annotation", thread=2),
    ]
    shared = breakdown(events, SIZES, "train_step")
    parts = {name: round(1e6 * value) for name, value in shared.seconds.items() if value}
    assert parts == {PROJECTIONS: 30, OPTIMIZER: 10, COMMUNICATION: 15, IDLE: 45}
    assert shared.communication == pytest.approx(20e-6)
    with pytest.raises(ValueError, match="no range 'ProfilerStep'"):
        breakdown(events, SIZES, "ProfilerStep")


def test_what_lies_between_steps_is_left_out() -> None:
    """Also two at once, one over the end of the steps, and what runs in them."""
    events = [
        event("ProfilerStep#1", 0, 50, "user_annotation"),
        event("ProfilerStep#2", 50, 50, "user_annotation"),
        event("aten::mm", 5, 10, **{"Input Dims": [[64, HIDDEN], [HIDDEN, HIDDEN]]}),
        event("between steps: validation", 40, 20, "user_annotation"),
        event("aten::softmax", 41, 8),
        event("between steps: checkpoint", 45, 25, "user_annotation"),
        event("aten::add", 65, 15),
        event("between steps: checkpoint", 90, 30, "user_annotation"),
    ]
    shared = breakdown(events, SIZES, "ProfilerStep", aside="between steps: ")
    parts = {name: round(1e6 * value) for name, value in shared.seconds.items() if value}
    assert parts == {PROJECTIONS: 10, ELEMENTWISE: 10, IDLE: 40} and shared.window == pytest.approx(60e-6)
    assert breakdown(events, SIZES, "ProfilerStep", aside="no such").window == pytest.approx(100e-6)


def test_kernels_belong_to_the_operator_that_launched_them() -> None:
    """Two host threads, two streams, launches through the runtime and the driver, one from a thread that has no
    operators, and kernels that nobody launched."""
    shapes = {"Input Dims": [[64, HIDDEN], [HIDDEN, 192]]}
    events = [
        event("train_step", 0, 100, "user_annotation"),
        event("aten::mm", 1, 5, **shapes, **{"External id": 40}),
        event("cudaLaunchKernel", 2, 1, "cuda_runtime", correlation=7),
        event("autograd::engine::evaluate_function: X", 3, 9, thread=2),
        event("aten::_flash_attention_backward", 4, 5, thread=2),
        event("cuLaunchKernelEx", 5, 1, "cuda_driver", thread=2, correlation=8),
        event("ampere_gemm", 20, 10, "kernel", thread=70, correlation=7),
        event("a_kernel", 30, 10, "kernel", thread=70, correlation=8),
        event("ncclDevKernel_AllGather", 35, 10, "kernel", thread=71, correlation=9),
        event("cudaLaunchKernel", 3, 1, "cuda_runtime", thread=3, correlation=11),
        event("hopper_gemm", 50, 5, "kernel", thread=70, correlation=11, **{"External id": 40}),
        event("Memset", 60, 10, "gpu_memset", thread=70, correlation=10),
        event("train_step", 0, 100, "gpu_user_annotation", thread=70),
    ]
    found = {interval.start: interval.category for interval in intervals(events, SIZES)}
    assert found == {20: MLP, 30: ATTENTION, 35: COMMUNICATION, 50: MLP, 60: ELEMENTWISE}


@pytest.mark.parametrize(
    ("name", "dims", "wanted"),
    [
        ("aten::mm", [[64, HIDDEN], [HIDDEN, HIDDEN]], PROJECTIONS),
        ("aten::addmm", [[48], [64, HIDDEN], [HIDDEN, 48], [], []], PROJECTIONS),
        ("aten::mm", [[192, 64], [64, HIDDEN]], MLP),  # the weight's gradient, gate beside up
        ("aten::mm", [[64, 96], [96, HIDDEN]], MLP),
        ("aten::mm", [[64, HIDDEN], [HIDDEN, 250]], HEAD),
        ("aten::mm", [[250, 16], [16, HIDDEN]], HEAD),  # a chunk of the tokens
        ("mkldnn::_linear_pointwise", [[2, 32, 96], [HIDDEN, 96]], MLP),
        ("aten::bmm", [[8, 32, 16], [8, 16, 32]], ATTENTION),
        ("aten::to", [[2, 32, 250], []], HEAD),
        ("aten::logsumexp", [[64, 250], []], HEAD),
        ("aten::logsumexp", [[2, 4, 32, 32], []], ATTENTION),  # of the scores, in a step that takes statistics
        ("aten::embedding_dense_backward", [[64, HIDDEN], [64]], ELEMENTWISE),
        ("aten::_foreach_norm", [[[250, HIDDEN]]], OPTIMIZER),
    ],
)
def test_operators_by_name_and_sizes(name: str, dims: list, wanted: str) -> None:
    assert category("", [event(name, 0, 1, **{"Input Dims": dims})], SIZES) == wanted


def test_as_many_tokens_as_the_intermediate_size_or_the_vocabulary() -> None:
    product = event("aten::mm", 0, 1, **{"Input Dims": [[96, HIDDEN], [HIDDEN, HIDDEN]]})
    assert category("", [product], Sizes(96, 96, 250)) == PROJECTIONS
    assert category("", [product], Sizes(96, 48, 96)) == PROJECTIONS
    assert category("", [product], SIZES) == MLP


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("triton_red_fused__log_softmax_nll_loss_forward_2", HEAD),
        ("triton_poi_fused__scaled_dot_product_flash_attention_cat_3", ELEMENTWISE),  # a copy beside it
        ("triton_tem_fused_flex_attention_0", ATTENTION),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", ATTENTION),
        ("liger_cross_entropy_kernel", HEAD),
        ("_rms_norm_forward_kernel", ELEMENTWISE),
    ],
)
def test_kernels_by_name(kernel: str, wanted: str) -> None:
    assert category(kernel, [], SIZES) == wanted


def test_what_is_done_to_weights_belongs_to_their_product() -> None:
    inner = event("aten::cat", 0, 1)
    for dims, wanted in (
        ([[2, 96, HIDDEN], [[HIDDEN, HIDDEN], [16, HIDDEN]], [2], []], PROJECTIONS),  # a sequence as long as 96 is none
        ([[2, 32, HIDDEN], [[96, HIDDEN], [96, HIDDEN]], [], []], MLP),
        ([[2, 32, 96], [[HIDDEN, 96]], [1], []], MLP),
    ):
        packed = event("titan_yulan::packed_linear_forward", 0, 2, **{"Input Dims": dims})
        assert category("", [packed, inner], SIZES) == wanted


def test_sizes_of_a_rank() -> None:
    assert Sizes.of(PRESETS["yulan_mini_2b"], 8192) == Sizes(8192, 4800, 99000)
    assert Sizes.of(PRESETS["yulan_mini_2b"], 8192, tensor=7) == Sizes(8192, 685, 14143)


def test_a_real_profile(tmp_path: Path) -> None:
    """A block in plain PyTorch, forward and backward: every part is found, and nothing is counted twice."""
    tokens, hidden, ffn, vocabulary = 128, 64, 160, 500
    shapes = [(vocabulary, hidden), (hidden, hidden), (ffn, hidden), (hidden, ffn)]
    weights = [torch.randn(shape).mul_(0.1).requires_grad_() for shape in shapes]
    embedding, projection, up, down = weights
    optimizer = torch.optim.AdamW(weights, fused=True)
    ids = torch.randint(vocabulary, (2, tokens // 2))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, record_function("step of a test"):
        x = functional.embedding(ids, embedding)
        query = functional.linear(x, projection).unflatten(-1, (4, 16)).transpose(1, 2)
        x = functional.scaled_dot_product_attention(query, query, query, is_causal=True).transpose(1, 2).flatten(2)
        x = functional.linear(functional.silu(functional.linear(x, up)), down)
        logits = functional.linear(x, embedding).flatten(0, 1)
        functional.cross_entropy(logits, ids.flatten()).backward()
        optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = read_trace(tmp_path / "trace.json")
    shared = breakdown(events, Sizes(tokens, ffn, vocabulary), "step of a test")
    assert sum(shared.seconds.values()) == pytest.approx(shared.window)
    missing = [name for name, value in shared.seconds.items() if value == 0]
    assert missing == [COMMUNICATION]
    averages = {row.key: row.self_cpu_time_total for row in profiler.key_averages()}
    attended = sum(time for name, time in averages.items() if "attention" in name.lower())
    assert shared.seconds[ATTENTION] >= 0.99e-6 * attended

    (tmp_path / "trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert breakdown(read_trace(tmp_path / "trace.json.gz"), Sizes(tokens, ffn, vocabulary), "step") == shared
