"""What a device has of its own: how its time is taken, how much memory a call takes, how many kernels it launches."""

import math
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.cases import Case


class HostClock:
    """The host's seconds for some calls one after another, until the device is done with them."""

    def __init__(self, span: float, wait: Callable[[], None] = lambda: None):
        self.span = span  # seconds; what is shorter is repeated, or the clock's own cost would be seen
        self.wait = wait

    def calls(self, seconds: float) -> int:
        """How many calls of so many seconds make a sample."""
        return 1 + int(self.span / seconds)

    def seconds(self, run: Callable[[Tensor], object], inputs: list[Tensor]) -> float:
        self.wait()
        start = time.perf_counter()
        for one in inputs:
            run(one)
        self.wait()
        return time.perf_counter() - start


class CudaClock:
    """The GPU's seconds between an event before a call and one behind it; each call finds an empty L2 cache.

    The GPU is kept busy while the host launches what lies between the events, so that they see the kernels, not the
    host. A call that makes the host wait for the GPU has that wait inside its time.
    """

    BUSY = 2_000_000  # cycles, about a millisecond

    def __init__(self, buffer: Tensor, cuda=torch.cuda):
        self.buffer = buffer  # a few times as large as the cache
        self.cuda = cuda
        self.start, self.end = (cuda.Event(enable_timing=True) for _ in range(2))

    def calls(self, seconds: float) -> int:
        return 1

    def seconds(self, run: Callable[[Tensor], object], inputs: list[Tensor]) -> float:
        total = 0.0
        for one in inputs:
            self.flush()
            self.cuda._sleep(self.BUSY)
            self.start.record()
            run(one)
            self.end.record()
            self.end.synchronize()
            total += self.start.elapsed_time(self.end) / 1e3
        return total

    def flush(self) -> None:
        """Written to drive the cache's content out, then read: else the writing back would fall into the call."""
        self.buffer.zero_()
        self.buffer.sum()


class Cpu:
    name = "cpu"
    bandwidth = 0.0
    errors = ()  # that cost a case, not the run

    def clock(self, case: Case) -> HostClock:
        return HostClock(span=200e-6)

    def prepare(self, case: Case) -> None:
        pass

    def peak_bytes(self, run: Callable[[Tensor], object], logits: Tensor) -> int:
        """What a call takes beside its input at its peak, as torch's profiler sees its allocator."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run(logits)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(accumulate((event.nbytes() for event in events), initial=0))

    def launches(self, call: Callable[[Tensor], Tensor], logits: Tensor) -> None:
        return None


class Cuda:
    name = "cuda"
    errors = (RuntimeError,)
    # Of a case, at its largest: native's step under autocast beside the logits and float64's gradient.
    BYTES_PER_LOGIT = 36

    def __init__(self):
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.host = HostClock(span=5e-3, wait=torch.cuda.synchronize)
        self.device = CudaClock(torch.empty(max(4 * cache, 256 << 20) // 4, dtype=torch.int32, device="cuda"))
        self.bandwidth = self.copy_bandwidth()

    def clock(self, case: Case) -> HostClock | CudaClock:
        return self.host if case.latency else self.device

    def copy_bandwidth(self, size: int = 2 << 30, samples: int = 21) -> float:
        """Bytes per second that a large copy reads and writes."""
        source = torch.ones(size // 4, dtype=torch.int32, device="cuda")
        copy = torch.empty_like(source).copy_
        seconds = sorted(self.device.seconds(copy, [source]) for _ in range(samples))
        return 2 * size / seconds[samples // 2]

    def prepare(self, case: Case) -> None:
        """Gives the memory of former cases back, so that none finds their blocks; raises if there is too little."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if math.prod(case.shape) * self.BYTES_PER_LOGIT > free:
            raise RuntimeError(f"{free / 1e9:.0f} GB of free memory are too little")

    def peak_bytes(self, run: Callable[[Tensor], object], logits: Tensor) -> int:
        """What a call takes beside its input at its peak, as torch's allocator counts."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(logits)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Callable[[Tensor], Tensor], logits: Tensor) -> int | None:
        """Kernels, copies and fills of a step, without the 1 that backward starts from; None without a profiler."""
        one = torch.ones_like(call(logits), requires_grad=False)
        own = logits.detach().requires_grad_().clone()
        torch.cuda.synchronize()
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                torch.autograd.grad(call(own), own, one)
                torch.cuda.synchronize()
        except RuntimeError:
            return None
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.is_user_annotation for event in on_device) or None

    def graphed(self, step: Callable[[Tensor], object], logits: Tensor) -> Callable[[Tensor], object]:
        """A step captured in a CUDA graph, as what replays it; the graph reads logits of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up once must not happen while the graph is captured
            for _ in range(3):
                step(logits.detach().requires_grad_().clone())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        own = logits.detach().requires_grad_().clone()
        with torch.cuda.graph(graph):
            step(own)
        return lambda _: graph.replay()


DEVICES: dict[str, type[Cpu] | type[Cuda]] = {"cpu": Cpu, "cuda": Cuda}
