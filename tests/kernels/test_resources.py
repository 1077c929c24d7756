"""Every Triton kernel, compiled without a GPU: no spilled register, shared memory that fits.

For H100 always, for A100 and B200 in `make deep`: compiling anew takes minutes.
"""

import sys

import pytest
from project import BENCHMARKS

pytest.importorskip("triton")
sys.path.append(str(BENCHMARKS))
from resources import SHARED_LIMIT, compiled, launches_of, operations, operations_on_values, table

H100 = 90
CAPABILITIES = [pytest.param(sm, marks=[] if sm == H100 else pytest.mark.deep) for sm in SHARED_LIMIT]


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
