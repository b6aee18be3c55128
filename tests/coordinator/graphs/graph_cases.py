"""Helpers of the graph tests: run a graph, and the same step in torch float64."""

import copy

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from fleetprune_coordinator.graphs.verification import native_block

torch.set_num_threads(1)

BLOCKS = (0, native_block()) if native_block() else (0,)


def open_session(graph):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(graph.onnx, options, providers=["CPUExecutionProvider"])


def run_graph(graph, feeds):
    session = open_session(graph)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def flat(tensors):
    parts = [t.detach().reshape(-1) for t in tensors]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def running(model):
    return [b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))]


def step_feeds(model, x, y, sw, lr=0.05):
    params = flat(model.parameters()).astype(np.float32)
    feeds = {
        "x": x.numpy(),
        "y": y.numpy(),
        "sw": np.asarray(sw, np.float32),
        "lr": np.array(lr, np.float32),
        "params": params,
        "momentum": np.zeros_like(params),
    }
    if running(model):
        feeds["stats"] = flat(running(model)).astype(np.float32)
    return feeds


def torch_step(model, x, y, sw, loss, dtype=torch.float64):
    """Loss, gradients and BatchNorm statistics of torch, on a copy of the model."""
    twin = copy.deepcopy(model).to(dtype).train()
    x = x.to(dtype) if x.is_floating_point() else x
    y = y.to(dtype) if y.is_floating_point() else y
    sw = torch.as_tensor(sw, dtype=dtype)
    value = (loss(twin(x), y) * sw).sum() / sw.sum()
    value.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
    return value.item(), flat(gradients), flat(running(twin))


def relative_error(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def randomise(model, seed=0):
    """Weights as torch draws them; scales, biases and statistics away from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator) if p.dim() == 1 else 0)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))
    return model


class Scaled(nn.Module):
    """A layer behind a trained factor, so that its input's gradient is checked too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.factor = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        return self.layer(x * self.factor)
