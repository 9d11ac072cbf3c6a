import torch
from task import input_t, output_t
from utils import make_match_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def generate_input(rows: int, columns: int, seed: int) -> input_t:
    generator = torch.Generator(device=DEVICE)
    generator.manual_seed(seed)
    x = torch.randn(rows, columns, device=DEVICE, generator=generator)
    scale = torch.randn(rows, device=DEVICE, generator=generator)
    return x, scale, torch.empty_like(x)


def ref_kernel(data: input_t) -> output_t:
    x, scale, output = data
    output[...] = (x.double() * scale.double()[:, None]).float()
    return output


check_implementation = make_match_reference(ref_kernel, rtol=1e-4, atol=1e-5)
