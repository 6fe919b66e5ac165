"""On a GPU: the CUDA variant of build/, through get_kernel and the loopback Hub, against the reference."""

from __future__ import annotations

import pytest
import torch
from hub_client import NAME

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CODE = """
import hashlib, json, os
import torch
from kernels import get_kernel, get_loaded_kernels, has_kernel
found = has_kernel("org/flash-kda", version=1, trust_remote_code=True)
package = get_kernel("org/flash-kda", version=1, trust_remote_code=True)
(loaded,) = get_loaded_kernels()

torch.manual_seed(0)
B, T, H, D = 2, 1000, 4, 128
q, k, v, g = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
beta = torch.randn(B, T, H, device="cuda", dtype=torch.bfloat16)
A_log, dt_bias = torch.rand(H, device="cuda"), torch.rand(H, D, device="cuda")
call = dict(
    A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0, output_final_state=True, use_gate_in_kernel=True,
    use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, state_v_first=True,
)
o, state = package.chunk_kda(q, k, v, g, beta, **call)

out, final = torch.empty_like(v), torch.empty(B, H, D, D, device="cuda")
package.fwd(q, k, v, g, beta, D**-0.5, out, A_log, dt_bias, -5.0, final_state=final)

exact = [x.double() for x in (q, k, v, g, beta)]
call.update(A_log=A_log.double(), dt_bias=dt_bias.double())
expected, expected_state = package.reference.recurrent_kda(*exact, **call)

def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()

print(json.dumps(dict(
    found=found, variant=os.path.basename(os.path.dirname(package.__file__)), repo=loaded.repo_info.repo_id,
    bits=hashlib.sha256(out.view(torch.int16).cpu().numpy().tobytes()).hexdigest(),
    cached=package.__file__.startswith(os.environ["HF_HOME"]), same=torch.equal(o, out),
    errors=[error(o, expected), error(state, expected_state), error(final, expected_state)],
    device=torch.cuda.get_device_name(), torch=torch.__version__,
)))
"""


def test_cuda_variant_through_get_kernel(hub, client, record_property):
    output = client.output(CODE)
    print(output)
    for name, value in output.items():
        record_property(name, value)
    major = torch.version.cuda.split(".")[0]
    assert output["found"] and output["repo"] == NAME and output["cached"]
    assert output["variant"].startswith(f"torch-stable-abi211-cu{major}")
    assert output["same"], "chunk_kda and fwd are one kernel"
    assert max(output["errors"]) < 5e-3  # bf16 operands, as for every gate in tests/gpu

    hub.requests.clear()
    assert client.output(CODE)["bits"] == output["bits"], "the same again from the warm cache"
    assert hub.downloads() == []
