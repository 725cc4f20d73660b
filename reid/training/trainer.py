"""Run the training step of train.py: precision, compiler, CUDA graph, averaged weights, and the state of all that."""

import copy
import gc
import warnings
from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from reid import ReidError, distributed
from reid.cli import first_line
from reid.model import DTYPES, pick_precision


class Trainer:
    """Call `train_step(trainer, images, numbers, labels, rows)` for every batch, in the fastest way that the machine supports.

    train_step: one update of the weights; returns a dict of scalar tensors to log. It may use `network` (the model, perhaps
    compiled), `optimizer`, `scaler`, `parameters`, `teacher`, `args` and the methods below, and must not wait for the device.
    On CUDA it is recorded once as a CUDA graph and replayed, so that Python's decisions in it are taken once.
    optimizer: over the parameters that learn, of `model` and of the map of `teacher`, a Teacher or None. args: the settings of
    train.py. steps: those of an epoch.
    """

    def __init__(self, model, optimizer, train_step, args, steps, device, teacher=None):
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device.index or 0)  # streams and graphs belong to the current device
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        self.model, self.optimizer, self.train_step, self.args, self.device = model, optimizer, train_step, args, device
        self.network, self.teacher = model, teacher
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for group in optimizer.param_groups:
            if cuda:
                group["lr"] = torch.tensor(group["lr"], device=device)  # a graph reads it from memory
            for parameter in group["params"] if group.get("momentum") else []:
                # The fused SGD allocates momentum without a value, and fp16 may skip the step that would write it.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.precision = pick_precision(device, args.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # creates its tensors, which a graph may not
        self.averaged = copy.deepcopy(model).requires_grad_(False) if args.ema else None
        self.compile_wanted, self.graph_wanted = args.compile == "on", cuda
        self.prepared, self.graph, self.inputs, self.scalars = False, None, None, None
        self.stream = torch.cuda.Stream(device) if cuda else None  # of the attempts in `_prepare`, and of the graph
        self.steps, self.logged, self.rates = steps, [], []  # what the steps of an epoch return, and their learning rates

    def describe(self):
        """Return the device, the precision and the way of the step that is tried first, as text."""
        parts = [torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu", self.precision,
                 "compiled" if self.compile_wanted else "eager"] + ["CUDA graph"] * self.graph_wanted
        return ", ".join(parts + [f"{distributed.world_size} ranks"] * (distributed.world_size > 1))

    def close(self):
        """Release the CUDA graph, which must happen before the process group is left: see `distributed.stop`."""
        if self.graph is not None:
            torch.cuda.synchronize(self.device)
            self.graph = self.scalars = None
            gc.collect()

    def train(self):
        """Switch to training mode. With --freeze_bn, the backbone keeps its batch-norm statistics; the neck does not."""
        self.model.train()
        if self.args.freeze_bn:
            self.model.body.eval()

    def autocast(self):
        """Return the context in which the networks compute in `precision`."""
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def step(self, images, numbers, labels, rows, learning_rate):
        """Train on a batch, tensors on the device as `train_step` takes them."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        batch = images, numbers, labels, rows
        try:
            if not self.prepared:
                self._prepare(batch)
            if self.graph is None:
                self.scalars = self.train_step(self, *batch)
            else:
                for static, tensor in zip(self.inputs, batch):
                    static.copy_(tensor)
                self.graph.replay()
        except torch.OutOfMemoryError as error:
            raise ReidError(f"the GPU's memory is full: lower --batch_size {self.args.batch_size}, or keep the images "
                            "elsewhere with --cache host") from error
        self.logged.append(torch.stack([scalar.detach().float() for scalar in self.scalars.values()]))
        self.rates.append(learning_rate)

    def _prepare(self, batch):
        """Choose the way of the step, once: compiled if that works, in a CUDA graph if that works, else as it is written.

        Ranks must run the same collectives, so a way is taken if it works on all of them. What the attempts change is put
        back to the last bit.
        """
        state, self.prepared = self._state_tensors(), True
        before = [tensor.detach().clone() for tensor in state]

        def works(name, attempt, *args):
            try:
                reason = attempt(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers, drivers and libraries fail in ways of their own
                while error.__context__:  # a recording that fails raises once more when it is ended
                    error = error.__context__
                reason = first_line(error)
            with torch.no_grad():
                torch._foreach_copy_(state, before)
            reasons = [reason for reason in distributed.gather_objects(reason) if reason]
            if reasons and distributed.rank == 0:
                print(f"training step: no {name} here ({reasons[0]}); going on without", flush=True)
            return not reasons

        if self.compile_wanted:
            self.network = torch.compile(self.model)
            if not works("compiled network", self._run_alone, batch):
                self.network = self.model
        # After a failed recording CUDA's allocator may be damaged, so a second attempt, not compiled, is not made.
        if self.graph_wanted and not (works("CUDA graph", self._record, batch) and works("CUDA graph", self._replay, before)):
            self.graph = self.inputs = None
            gc.collect()

    @contextmanager
    def _on_own_stream(self):
        """Run on `stream`: what autograd keeps of a step belongs to its stream, and a recording must not leave it."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def _run_alone(self, batch):
        """Run a step without collectives: a rank whose compiler fails would leave the others waiting in one."""
        with distributed.alone(), self._on_own_stream():
            self.train_step(self, *batch)

    def _record(self, batch):
        """Record a step as a CUDA graph, after three steps that let libraries allocate what they need."""
        self.inputs = [tensor.clone() for tensor in batch]
        with self._on_own_stream(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                self.train_step(self, *self.inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):  # other threads may decode meanwhile
            self.scalars = self.train_step(self, *self.inputs)
        self.graph = graph

    def _replay(self, before):
        """Require that a replay changes a weight: a graph recorded on the wrong device or stream is empty, without an error."""
        for _ in range(32 if self.scaler.is_enabled() else 1):  # fp16 skips steps until its loss scale fits
            self.graph.replay()
            if not all(torch.equal(*pair) for pair in zip(self.parameters, before)):
                return None
        return "a replay changes no weight"

    def _state_tensors(self):
        """Return every tensor that a step changes, the parameters first."""
        averaged = self.averaged.state_dict().values() if self.averaged else []
        moments = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        scale = [self.scaler._scale, self.scaler._growth_tracker] if self.scaler.is_enabled() else []
        return [*self.parameters, *self.model.buffers(), *averaged, *moments, *scale]

    @torch.no_grad()
    def average_weights(self, decay):
        """Update the moving average: averaged = decay * averaged + (1 - decay) * weights."""
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)

    @torch.no_grad()
    def refresh_norms(self, batches):
        """Give the averaged weights batch-norm statistics of their own, the mean over batches of float32 [B, 3, H, W]."""
        frozen = set(self.averaged.body.modules()) if self.args.freeze_bn else set()
        norms = [module for module in self.averaged.eval().modules() if isinstance(module, _BatchNorm) and module not in frozen]
        for norm in norms:
            norm.train()
        for i, images in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (i + 1)
            with self.autocast():
                self.averaged.neck(self.averaged.features(images))
        for norm in norms:
            norm.eval().momentum = 0.1
        distributed.average_([statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)])

    def synchronise(self):
        """Average over the ranks what each has from its own images: what it has logged, and the batch-norm statistics."""
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point() and buffer.ndim == 1]
        logged = torch.stack(self.logged)
        distributed.average_([logged, *statistics])
        self.logged = list(logged)

    def end_epoch(self, end):
        """Return the mean of what was logged in an epoch. end: number of the step after its last one.

        Waits for the device, which no step does. Raises ReidError if a loss was not finite.
        """
        self.synchronise()
        losses, first_step = torch.stack(self.logged).cpu(), end - len(self.rates)
        bad = (~torch.isfinite(losses).all(1)).nonzero().flatten().tolist()
        if bad:
            parts = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.scalars, losses[bad[0]].tolist()))
            raise ReidError(f"the loss is not finite at step {first_step + bad[0]}, learning rate {self.rates[bad[0]]:.4g}: "
                            f"{parts}; lower --lr or lengthen --warmup_epochs (best.pth and last.pth are as before)")
        metrics = {f"train/{name}": value for name, value in zip(self.scalars, losses.mean(0).tolist())}
        metrics["train/lr"] = self.rates[-1]
        if self.device.type == "cuda":
            metrics["train/memory_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        self.logged, self.rates = [], []
        return metrics

    @property
    def best_model(self):
        """The weights to evaluate and to keep: the averaged ones where there are any."""
        return self.averaged or self.model

    @torch.no_grad()
    def embed(self, cache, rows):
        """Return the output of the neck of the best weights, float32 [n, D]. rows: int64 [n], of the cache, one or more."""
        model, parts = self.best_model.eval(), []
        for part in rows.split(128):
            with self.autocast():
                parts.append(model.neck(model.features(cache[part])).float())
        return torch.cat(parts)

    def state(self):
        """Return what exact resume needs beside the weights. No random state: a step draws no random numbers.

        A run that goes on has the same weights, to the last bit on a CPU; some kernels of CUDA add in another order each time.
        """
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "averaged": self.averaged.state_dict() if self.averaged else None, "rates": self.rates,
                "map": self.teacher.map.state_dict() if self.teacher else None,
                "logged": torch.stack(self.logged) if self.logged else None}

    def load_state(self, weights, state):
        """Continue from `weights`, a state_dict of the model, and from what `state` has returned."""
        self.model.load_state_dict(weights)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate  # a number on a CPU, a tensor on a GPU
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        if self.teacher:
            self.teacher.map.load_state_dict(state["map"])
        if state.get("rates"):  # stopped within an epoch; older checkpoints do not have them
            self.rates, self.logged = list(state["rates"]), list(state["logged"].to(self.device))
