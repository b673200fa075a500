"""Several processes, one a GPU: `torchrun --nproc-per-node 8 bstar.py ...`, with the same flags.

weights, gradients, moments   a share lies in each process (FSDP2)    shard, inside, whole, load
sampling, scoring             are dealt; all processes get all        dealt, gathered
the rest                      is the same in all; the first writes    by_first

Alone, nothing here does anything. The processes make the same calls in the same order: what waits
for the others must never stand under a condition that may differ between them.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import data
from data import UserError

# torchrun's alone: a cluster's scheduler sets RANK, too, for processes that don't meet
_env = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, WORLD = int(_env.get("RANK", 0)), int(_env.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = int(_env.get("LOCAL_RANK", 0)), int(_env.get("LOCAL_WORLD_SIZE", 1))

# -- the processes --------------------------------------------------------------------------------


def together(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a script's main: all of torchrun's processes run it; alone, it is main itself.

    The first process speaks; another is heard where it alone fails.
    """
    if WORLD == 1:
        return main

    @functools.wraps(main)
    def main_of_many(*args, **kwargs) -> None:
        streams = sys.stdout, sys.stderr
        if RANK > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            join()
            main(*args, **kwargs)
            wait()
            atexit.register(leave)
        except (Exception, KeyboardInterrupt) as e:
            # who leaves waits for what is in flight, and after an error it may never arrive
            atexit.unregister(leave)
            # torchrun ends all with the first that ends. What fails everywhere is for the first to
            # say, and a RuntimeError may be but the end of another, which speaks then.
            if RANK > 0 or isinstance(e, RuntimeError):
                time.sleep(20)
            raise
        finally:
            sys.stdout, sys.stderr = streams

    return main_of_many


def join() -> None:
    """Takes this process's GPU, before anything touches CUDA, and meets the others, once."""
    import torch
    import torch.distributed as dist

    # Imported after the groups are made, torch.distributed.nn would hold one, as the default of its
    # functions' arguments, and `leave` could not end it.
    import torch.distributed.fsdp

    # torchrun's store keeps the addresses of groups that have ended, so a second main takes these
    if dist.is_initialized():
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: ends with torchrun, if killed
    backend, n_gpus = "gloo", torch.cuda.device_count()
    if n_gpus > 0:
        if LOCAL_WORLD > n_gpus:
            raise UserError(f"--nproc-per-node {LOCAL_WORLD}: expected at most {n_gpus}, one a GPU")
        torch.cuda.set_device(LOCAL_RANK)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(days=7))  # another run may make the PRM


def leave() -> None:
    """Ends the groups and, with the last that holds them, gloo's threads.

    A thread of gloo's that still runs while the interpreter ends, and lets go of a tensor of
    Python's there, aborts the process.
    """
    from torch.distributed import destroy_process_group
    from torch.distributed.device_mesh import DeviceMesh

    gc.collect()  # models in shares are rings, and hold groups
    for x in gc.get_objects():
        if type(x) is DeviceMesh:  # caches of torch's keep it
            x._pg_registry.clear()
    destroy_process_group()


def gathered(x) -> list:
    """[x of every process], in every process."""
    if WORLD == 1:
        return [x]
    import torch.distributed as dist

    every = [None] * WORLD
    dist.all_gather_object(every, x)
    return every


def wait() -> None:
    """Waits for all the others to come here."""
    gathered(None)


def by_first(function: Callable) -> Callable:
    """The function, done by the first process while the others wait; it returns nothing."""

    @functools.wraps(function)
    def once(*args, **kwargs) -> None:
        wait()  # the others may still read what it changes
        if RANK == 0:
            function(*args, **kwargs)
        wait()

    return once


def dealt(function: Callable[..., list], *columns: list) -> list:
    """function(*columns), one result a row, of which every process makes its share."""
    if WORLD == 1:
        return function(*columns)
    mine = [column[RANK::WORLD] for column in columns]
    results = [None] * len(columns[0])
    for rank, part in enumerate(gathered(function(*mine))):
        results[rank::WORLD] = part
    return results


def micro_batches(batch: list, token_budget: int, nothing: Callable) -> list:
    """This process's micro-batches of a global batch (see data.micro_batches), as many as any's.

    nothing  ids -> what stands beside ids of which no token counts; such a row fills up the number
    """
    order = sorted(batch, key=lambda example: len(example[0]), reverse=True)
    shares = [order[rank::WORLD] for rank in range(WORLD)]  # of about as many tokens
    cut = [list(data.micro_batches(share, token_budget)) for share in shares]
    mine, most = cut[RANK], max(map(len, cut))
    shortest = order[-1][0]
    # every forward and backward pass gathers weights from all: one that made fewer would stop them
    return mine + [([shortest], [nothing(shortest)])] * (most - len(mine))


# -- a model in shares ----------------------------------------------------------------------------


@functools.cache  # it makes groups of processes
def mesh(device: str):
    """The processes: weights lie in shares over one node's; several nodes are replicas (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (WORLD // LOCAL_WORLD, LOCAL_WORLD)
    nodes = init_device_mesh(device, shape, mesh_dim_names=("node", "gpu"))
    return nodes if shape[0] > 1 else nodes["gpu"]


def shard(model, device: str):
    """The model on the device; of several processes each keeps a share of every weight."""
    if WORLD == 1:
        return model.to(device)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for part in (*layers, model):  # a layer is whole while it computes
        fully_shard(part, mesh=mesh(device), reshard_after_forward=True)
        # gradients are summed, not averaged: each process's loss is its part of the global mean
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.inside = lambda function, *args: function(*args)
    register_fsdp_forward_method(model, "inside")
    return model


def inside(model, function: Callable, *args):
    """function(*args), which calls parts of the model, with the weights whole as in its forward."""
    return model.inside(function, *args) if hasattr(model, "inside") else function(*args)


def full(x):
    """A tensor, whole, in every process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole(state):
    """A state_dict as alone, on the host, in the first process; tensors are None in the others."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()  # one at a time
    return tensor.cpu() if RANK == 0 else None


def share(x, like):
    """This process's share of a whole tensor, laid out as `like`."""
    if not hasattr(like, "placements"):
        return x
    from torch.distributed.tensor import distribute_tensor

    x = x.to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def load(policy, weights: dict) -> None:
    """A whole state_dict into a policy, in shares or not."""
    own = policy.state_dict()
    policy.load_state_dict({name: share(weights[name], x) for name, x in own.items()})


def load_moments(optimizer, saved: dict) -> None:
    """A whole optimizer's state_dict into an optimizer of one group, in shares or not."""
    [group] = optimizer.param_groups
    for p, moments in zip(group["params"], saved["state"].values(), strict=True):
        for name, value in moments.items():
            if value.dim() > 0:  # the step's number is whole everywhere
                moments[name] = share(value, p)
    optimizer.load_state_dict(saved)


def replica(model):
    """A copy of the model with all its weights, in every process; alone, the model itself."""
    if not hasattr(model, "inside"):
        return model
    kind = type(model).__bases__[1]  # fully_shard made a class (FSDPModule, kind)
    weights = {name: full(x) for name, x in model.state_dict().items()}
    copy = kind(model.config).to(model.device)
    copy.load_state_dict(weights)
    return copy
