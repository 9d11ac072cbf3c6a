import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import from_dlpack

THREADS = 256


@cute.kernel
def _scaled_softmax(x: cute.Tensor, scale: cute.Tensor, y: cute.Tensor, columns: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    lane = thread % 32
    if thread < 32:
        largest = -cutlass.Float32.inf
        for at in range(lane, columns, 32):
            largest = cutlass.max(largest, x[row, at])
        largest = cute.arch.warp_reduction_max(largest)
        total = cutlass.Float32(0.0)
        for at in range(lane, columns, 32):
            total += cute.math.exp(x[row, at] - largest)
        total = cute.arch.warp_reduction_sum(total)
        for at in range(lane, columns, 32):
            y[row, at] = cute.math.exp(x[row, at] - largest) / total * scale[at]


@cute.jit
def _launch(x: cute.Tensor, scale: cute.Tensor, y: cute.Tensor, columns: cutlass.Constexpr, stream: cuda.CUstream):
    _scaled_softmax(x, scale, y, columns).launch(grid=[x.shape[0], 1, 1], block=[32, 1, 1], stream=stream)


class ModelNew(torch.nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(columns))
        self.compiled = {}

    def forward(self, x):
        y = torch.empty_like(x)
        stream = cuda.CUstream(torch.cuda.current_stream().cuda_stream if x.is_cuda else 0)
        tensors = [from_dlpack(tensor.detach()) for tensor in (x, self.scale, y)]
        if x.shape not in self.compiled:
            self.compiled[x.shape] = cute.compile(_launch, *tensors, x.shape[1], stream)
        self.compiled[x.shape](*tensors, stream)
        return y
