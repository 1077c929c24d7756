"""Every Triton kernel, compiled without a GPU: no spilled register, shared memory that fits.

For H100 and B200 always, for the other GPUs in `make deep`: compiling anew takes minutes.
"""

import sys

import pytest
from project import BENCHMARKS

pytest.importorskip("triton")
sys.path.append(str(BENCHMARKS))
from resources import SHARED_LIMIT, compiled, compiled_as, launches_of, operations, operations_on_values, table

ALWAYS = (90, 100)
CAPABILITIES = [pytest.param(sm, marks=[] if sm in ALWAYS else pytest.mark.deep) for sm in SHARED_LIMIT]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [*operations(), *operations_on_values()])
def test_kernels_fit(name: str, capability: int) -> None:
    on_values = operations_on_values()
    launches = launches_of({**operations(), **on_values}[name], capability, name in on_values)
    assert launches
    usages = [compiled(name, launch, capability) for launch in launches]
    assert all(usage.fits for usage in usages), table(usages)


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05.mma")])
def test_the_fused_product_runs_on_the_tensor_cores(capability: int, instruction: str) -> None:
    (launch,) = launches_of(operations()["fused product"], capability)
    assert compiled("", launch, capability).matrix_instruction == instruction


BY_TOKENS = [name for name in operations() if "adapters" not in name and name != "attention, bias"]


@pytest.mark.parametrize("name", BY_TOKENS)
def test_the_number_of_tokens_compiles_nothing_anew(name: str) -> None:
    """Packed batches differ in it from step to step. Only whether rows of a dense bias are aligned is compiled for."""
    first, second = ([compiled_as(x) for x in launches_of(operations(n)[name], 90)] for n in (4096, 4099))
    assert first == second


@pytest.mark.parametrize("name", ["adamw", "rms_norm", "swiglu", "linear_cross_entropy"])
def test_what_waits_for_memory_reads_16_bytes_at_once(name: str) -> None:
    on_values = operations_on_values()
    launches = launches_of({**operations(), **on_values}[name], 90, name in on_values)
    usages = [compiled(name, launch, 90) for launch in launches]
    assert all(usage.widest_load == 16 for usage in usages), table(usages)
