"""What GPU MODE tasks share; own lines, with the names that their references import."""

import torch


def make_match_reference(reference, rtol=1e-5, atol=1e-8):
    def check(data, output):
        expected = reference(data)
        if output.shape != expected.shape:
            return False, f"shape {tuple(output.shape)}, expected {tuple(expected.shape)}"
        wrong = int((~torch.isclose(output, expected, rtol=rtol, atol=atol, equal_nan=True)).sum())
        return (True, "") if wrong == 0 else (False, f"{wrong} elements differ")

    return check
