"""Test that the sanitizer finds nothing in the kernels, and finds each planted fault."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass, replace

import cases
import pytest
import torch
import triton_setup
from cases import run

import inspo_kernels as ik
from inspo_kernels import kernels
from inspo_kernels.row_sums import STATISTICS

if not triton_setup.INTERPRETED:
    pytest.skip("the sanitizer works in Triton's interpreter", allow_module_level=True)

import sanitizer
from sanitizer import Finding, Sanitizer

pytestmark = triton_setup.quiet
tl = triton_setup.tl
CASE = cases.make_case([(2, 3, 2), (1, 1, 4)], hidden_size=8, vocab=150)


@dataclass
class Fault:
    """A change of a kernel's source, every ``old`` to ``new``, and the sanitizer's message for it."""

    module: str
    old: str
    new: str
    finding: str


OUTSIDE = r"(load|store) outside its tensor"
UNWRITTEN = "a result follows from memory that nobody has written"
STORE_AT_LABEL = """if WANTED.store:
        {barrier}
        tl.store(p_e + label, rest.to(p_e.dtype.element_ty))
    p_parts += i_row"""
NO_BARRIER = Fault(
    "row_pass",
    "p_parts += i_row",
    STORE_AT_LABEL.format(barrier="pass"),
    r"two threads meet without a barrier between: .*`tl\.store\(p_e \+ label",
)
FAULTS = {
    "label_store_without_a_barrier": NO_BARRIER,
    "mask_of_a_column_more": Fault("row_pass", "mask = cols < num_cols", "mask = cols <= num_cols", OUTSIDE),
    "mask_of_a_feature_more": Fault("label_logits", "features < hidden", "features <= hidden", OUTSIDE),
    "mask_of_a_word_more": Fault("bias_gradient", "m_cols = cols < vocab", "m_cols = cols <= vocab", OUTSIDE),
    "row_stride_off_by_one": Fault("row_pass", "i_row * stride_raw", "i_row * (stride_raw + 1)", OUTSIDE),
    "row_stride_of_x_off_by_one": Fault("label_logits", "i_row * stride_x", "i_row * (stride_x + 1)", OUTSIDE),
    "two_programs_one_row": Fault(
        "row_pass", "p_rest + i_row", "p_rest + i_row // 2", "two programs store one element"
    ),
    "two_programs_one_label": Fault("label_logits", "p_out + i_row", "p_out + i_row // 2", "two programs store one"),
    "padding_is_summed": Fault("row_pass", "m_words = mask & (words < vocab)", "m_words = mask", UNWRITTEN),
    "first_tile_continues_another": Fault("row_pass", "if IS_FIRST:", "if False:", UNWRITTEN),
    "mask_of_a_row_more": Fault("fused_pass", "m_rows = rows < num_rows", "m_rows = rows <= num_rows", OUTSIDE),
    "tile_of_another_row": Fault(
        "fused_pass", "d_e.store([first_row,", "d_e.store([first_row // 2,", "two programs store"
    ),
    "two_programs_one_sum": Fault(
        "fused_pass",
        "p_sums + i_word.to(tl.int64) * num_rows",
        "p_sums + i_word // 2 * num_rows",
        "two programs store one",
    ),
    "two_lanes_one_offset": Fault(
        "fused_pass", "tl.store(p_offset + rows,", "tl.store(p_offset + rows // 2,", "two threads"
    ),
    "sum_of_a_tile_that_nobody_computed": Fault(
        "fused_pass", "tl.program_id(0), high * wide,", "tl.program_id(0), high * wide - 1,", UNWRITTEN
    ),
    "statistics_one_place_too_early": Fault(
        "fused_pass", "(1 + WANTED.moment) * step", "WANTED.moment * step", UNWRITTEN
    ),
    "flags_without_a_mask": Fault("fused_pass", "p_raised + rows, mask=m_rows, other=0", "p_raised + rows", OUTSIDE),
    "mask_of_a_scaled_feature_more": Fault("scale_rows", "features < hidden", "features <= hidden", OUTSIDE),
    "two_lanes_one_scaled_row": Fault(
        "scale_rows", "p_out + rows * stride_out", "p_out + rows // 2 * stride_out", "two threads"
    ),
    "sum_begins_with_fresh_memory": Fault("bias_gradient", "if ACCUMULATE:", "if True:", UNWRITTEN),
}


def all_kernels():
    """Return every kernel of the package as (module, name)."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    return [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]


def launch_all():
    """Launch every kernel through public functions, with a large and a small workspace."""
    for dtype in (torch.float32, torch.bfloat16):
        case = CASE.to(dtype)
        for workspace in (None, 1):
            run(case, backend="triton", marginal_weight=0.5, max_workspace_bytes=workspace)
            logps = {"bias": case.bias, "backend": "triton", "max_workspace_bytes": workspace}
            ik.linear_logps(case.hidden, case.weight, case.labels.clamp(min=0), **logps)
            # Such logits are so far apart that rows need another offset.
            far = 50 * case.hidden[:1], case.weight, case.labels[:1].clamp(min=0)
            ik.linear_logps(*far, **logps, statistics=STATISTICS)


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Return a function that plants a fault in a kernel for the duration of a test."""

    def planted(fault):
        name = f"{kernels.__name__}.{fault.module}"
        original = importlib.import_module(name)
        source = importlib.util.find_spec(name).loader.get_source(name)
        assert fault.old in source, f"{fault.module}.py no longer says {fault.old!r}: plant this fault in other words"
        (tmp_path / f"{fault.module}.py").write_text(source.replace(fault.old, fault.new))
        spec = importlib.util.spec_from_file_location(f"{name}_planted", tmp_path / f"{fault.module}.py")
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        for kernel in (name for module, name in all_kernels() if module is original):
            monkeypatch.setattr(original, kernel, getattr(changed, kernel))

    return planted


@pytest.mark.sweep
def test_no_finding_in_the_kernels_as_they_are():
    with Sanitizer() as checking:
        launch_all()
    assert checking.kernels == {name for _, name in all_kernels()}
    assert checking.counts["findings"] == 0
    assert checking.counts["loads"] > 10_000 and checking.counts["stores"] > 5_000


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name, plant):
    fault = FAULTS[name]
    plant(fault)
    with Sanitizer(), pytest.raises(Finding, match=fault.finding) as found:
        launch_all()
    assert f"{fault.module}.py:" in str(found.value)


@pytest.mark.sweep
def test_a_barrier_before_the_label_store_matters(plant):
    plant(replace(NO_BARRIER, new=STORE_AT_LABEL.format(barrier="tl.debug_barrier()")))
    with Sanitizer() as checking:
        launch_all()
        assert checking.counts["findings"] == 0
        checking.barriers = False
        with pytest.raises(Finding, match=NO_BARRIER.finding):
            launch_all()


def test_results_are_those_without_the_sanitizer():
    plain = run(CASE, backend="triton")
    with Sanitizer(seed=3):
        checked = run(CASE, backend="triton")
    assert torch.equal(plain[0].loss, checked[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], checked[1]))


def test_fresh_memory_is_nan():
    with Sanitizer():
        fresh = [torch.empty(3, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
        fresh += [
            torch.empty_like(torch.ones(4, 4).t()),
            torch.ones(1).new_empty(2, 3),
            torch.empty_strided((2,), (5,)),
        ]
        integers = torch.empty(3, dtype=torch.int64)
    assert all(t.isnan().all() for t in fresh) and (integers > 2**60).all()


@pytest.mark.parametrize(
    "view, inside",
    [
        (torch.zeros(6), range(6)),
        (torch.zeros(3, 8)[:, :5], [r * 8 + c for r in range(3) for c in range(5)]),
        (torch.zeros(4, 6).t(), range(24)),
        (
            torch.zeros(2, 3, 4)[:, 1:, ::2],
            [r * 12 + c * 4 + 2 * k for r in range(2) for c in range(2) for k in range(2)],
        ),
        (torch.zeros(3, 1).expand(3, 7), range(3)),
        (torch.zeros(()), [0]),
        (torch.zeros(0), []),
    ],
    ids=["vector", "padded_rows", "transposed", "strided", "expanded", "scalar", "empty"],
)
def test_a_view_holds_only_its_elements(view, inside):
    distances = torch.arange(-200, 400)
    held = distances[torch.from_numpy(sanitizer.View(view).holds(distances.numpy()))]
    assert held.tolist() == [4 * i for i in inside]


@triton_setup.triton.jit
def _rotate_kernel(p_values, SHIFT: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    values = tl.load(p_values + lanes)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_values + (lanes + SHIFT) % BLOCK, values)


@pytest.mark.parametrize("shift, barrier, meet", [(1, False, True), (1, True, False), (0, False, False)])
def test_threads_may_meet_across_a_barrier_only(shift, barrier, meet):
    values = torch.arange(8.0)
    with Sanitizer() as checking:
        if meet:
            with pytest.raises(Finding, match=r"two threads meet.*values = tl\.load.*; .*tl\.store"):
                _rotate_kernel[(1,)](values, shift, barrier, 8)
        else:
            _rotate_kernel[(1,)](values, shift, barrier, 8)
    assert checking.counts == {"launches": 1, "programs": 1, "loads": 8, "stores": 8, "findings": int(meet)}


@triton_setup.triton.jit
def _relay_kernel(p_values):
    i = tl.program_id(0)
    tl.store(p_values + i + 1, tl.load(p_values + i))


def test_a_program_may_not_read_what_another_writes():
    with Sanitizer(), pytest.raises(Finding, match="a program loads what another stores"):
        _relay_kernel[(4,)](torch.arange(5.0))


def test_a_stray_access_into_another_argument_is_outside():
    """The arguments are adjacent in memory, so a guard value would not detect the access."""
    memory = torch.zeros(12)

    @triton_setup.triton.jit
    def _stray_kernel(p_first, p_second):
        tl.store(p_first + 6, 1.0)
        tl.store(p_second, 2.0)

    with Sanitizer(), pytest.raises(Finding, match="_stray_kernel: a store outside its tensor"):
        _stray_kernel[(1,)](memory[:6], memory[6:])
    assert memory[6] == 2


@triton_setup.triton.jit
def _count_kernel(p_values):
    tl.atomic_add(p_values, 1.0)


def test_unsupported_accesses_are_refused():
    with Sanitizer(), pytest.raises(Exception, match="no rule for atomics"):
        _count_kernel[(1,)](torch.zeros(1))
    memory = torch.zeros(4)
    with Sanitizer(), pytest.raises(NotImplementedError, match="one memory under two dtypes"):
        _rotate_kernel[(1,)](memory, memory.view(torch.int32), 0, 4)


def test_the_seed_decides_the_order_of_programs():
    @triton_setup.triton.jit
    def _order_kernel(p_order):
        tl.store(p_order + tl.program_id(0), 1.0)

    orders = []
    for seed in (0, 0, 1):
        with Sanitizer(seed) as checking:
            _order_kernel[(20,)](torch.zeros(20))
            orders.append([int(rows[0, 0]) for rows in checking.launch.programs])
    starts = [[address - min(order) for address in order] for order in orders]
    assert starts[0] == starts[1] != starts[2] and sorted(starts[0]) == sorted(starts[2]) != starts[0]
