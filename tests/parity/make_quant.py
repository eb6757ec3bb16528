"""Write the golden file of NF4: what bitsandbytes makes of the kernels of quant_cases, on a CPU.

.venv-parity/bin/python tests/parity/make_quant.py
"""

import bitsandbytes.functional as bnb
import numpy as np
import quant_cases as cases
import torch
from safetensors.numpy import save_file

FILE = cases.GOLDEN / "quant.safetensors"


def theirs(case):
    _, _, dtype, block, double = cases.CASES[case]
    x = torch.tensor(cases.kernel(case)).to(getattr(torch, dtype))
    codes, state = bnb.quantize_4bit(x, blocksize=block, compress_statistics=double, quant_type="nf4")
    found = {"codes": codes, "absmax": state.absmax, "values": bnb.dequantize_4bit(codes, state).float()}
    if double:
        found |= {"nested": state.state2.absmax, "offset": state.offset.reshape(1)}
    return {name: np.ascontiguousarray(x.numpy()) for name, x in found.items()}


def map_of_scales():
    return bnb.create_dynamic_map().numpy()


if __name__ == "__main__":
    made = {f"{case} {name}": x for case in cases.CASES for name, x in theirs(case).items()}
    save_file({**made, "dynamic-map": map_of_scales()}, FILE)
    print(FILE, FILE.stat().st_size)
