"""The training step: forward, losses, backward, update, without waiting for Python."""

import copy
import math
import random
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from reid import ReidError, distributed
from reid.checkpoint import load_checkpoint, restore_model
from reid.model import DTYPES, pick_precision
from reid.training import augment
from reid.training.losses import PAIR_LOSSES, distillation_loss, identity_loss

PARTS = ("train/loss", "train/loss_id", "train/loss_pair", "train/accuracy")
NORM_BATCHES = 64  # batches that make the statistics of averaged weights


def learning_rate(step, steps, args):
    """Linear warm-up from 1 % of `--lr`, then a cosine to zero (Loshchilov and Hutter, arXiv 1608.03983).

    With `--swa` the cosine stops where the averaging begins: weights that no longer move would average to themselves.
    """
    warmup, total = round(args.warmup_epochs * steps), args.num_epochs * steps
    step = min(step, total - args.swa * steps)
    if step < warmup:
        return args.lr * (0.01 + 0.99 * step / warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Engine:
    """Model, optimizer and one step of training.

    On CUDA the whole step (augmentation to update, compiled where that pays) is one CUDA graph; what a machine cannot do
    is left out with a line that says so. Losses stay on the device until `end_epoch`.
    """

    def __init__(self, model, args, steps, device):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.args, self.steps, self.device = args, steps, device
        self.model = model.to(device)
        self.net = self.model
        self.stages = augment.stages(args)
        self.dtype = DTYPES[pick_precision(device, args.precision)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        cuda = device.type == "cuda"
        lr = torch.tensor(args.lr, device=device) if cuda else args.lr  # a graph reads it from memory
        self.optimizer = torch.optim.SGD(
            self.parameters, lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False) if args.ema or args.swa else None
        self.teacher = self._load_teacher(args.teacher) if args.teacher else None
        self.losses = torch.zeros(steps, len(PARTS), device=device)
        self.current = torch.zeros(len(PARTS), device=device)
        self.graph, self.graph_wanted = None, cuda and not self.scaler.is_enabled()
        if not self.graph_wanted and cuda:
            print("fp16 needs a loss scale that Python reads every step: no CUDA graph")
        compile_ = args.compile == "on" or (args.compile == "auto" and cuda and args.num_epochs >= 10)
        if compile_:
            self.net = torch.compile(self.model)

    def describe(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        parts = [name, str(self.dtype).removeprefix("torch."), "compiled" if self.net is not self.model else "eager"]
        if self.graph_wanted:
            parts.append("CUDA graph")
        return ", ".join(parts + ([f"{distributed.world_size} ranks"] if distributed.world_size > 1 else []))

    def train(self):
        self.model.train()
        if self.args.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.eval()

    def step(self, images, params, labels, step):
        """One update. images: uint8 [B, 3, H, W], params: float32 [B, P] of `augment.draw`, labels: int64 [B]."""
        lr = learning_rate(step, self.steps, self.args)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        try:
            if self.graph_wanted and self.graph is None:
                self._capture(images, params, labels)
            if self.graph:
                for static, value in zip(self.inputs, (images, params, labels)):
                    static.copy_(value)
                self.graph.replay()
            else:
                self._update(images, params, labels)
        except torch.OutOfMemoryError as error:
            raise ReidError(f"the GPU's memory is full at step {step}: lower --batch_size {self.args.batch_size}, or keep the "
                            f"images elsewhere with --cache host") from error
        self.losses[step % self.steps] = self.current

    def _update(self, images, params, labels):
        args = self.args
        x = augment.apply(images, params, self.stages)
        with self._autocast():
            pooled, logits = self.net(x)
        loss_id = identity_loss(logits, labels, args.smoothing)
        all_pooled, all_labels = distributed.gather(pooled), distributed.gather(labels)
        loss_pair = PAIR_LOSSES[args.pair_loss](all_pooled, all_labels, args.margin)
        # Every rank knows the pair loss of the whole batch but only its own part of the gradient: see distributed.gather.
        loss = loss_id + args.pair_weight * loss_pair * distributed.world_size
        if self.teacher:
            loss = loss + args.distill * distillation_loss(pooled, logits, *self._ask_teacher(x))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        distributed.average_([p.grad for p in self.parameters])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if args.ema:
            self._average_weights(1 - args.ema)
        with torch.no_grad():
            total = loss - args.pair_weight * loss_pair * (distributed.world_size - 1)
            correct = (logits.argmax(1) == labels).float().mean()
            self.current.copy_(torch.stack([total, loss_id, loss_pair, correct]).detach())

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def _average_weights(self, share):
        """Move the averaged weights by `share` of the way to the present ones."""
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), share)

    def average_epoch(self, epoch):
        """Stochastic weight averaging (Izmailov et al., arXiv 1803.05407): the mean of the weights at the ends of the last
        `--swa` epochs; until then the weights as they are. epoch: how many are done."""
        if self.args.swa:
            self._average_weights(1 / max(1, epoch - (self.args.num_epochs - self.args.swa)))

    @torch.no_grad()
    def refresh_norms(self, batches, params):
        """The averaged weights need batch-norm statistics of their own: from NORM_BATCHES batches of the epoch.

        batches: an iterable of uint8 [B, 3, H, W]; params: [steps, B, P] of `augment.draw`.
        """
        norms = [module for module in self.averaged.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.train().momentum = None  # the mean over all batches
        for images, drawn in zip(batches, params[:NORM_BATCHES]):
            with self._autocast():
                self.averaged.neck(self.averaged.features(augment.apply(images, drawn, self.stages)))
        for norm in norms:
            norm.eval().momentum = 0.1
        distributed.average_([statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)])

    def _capture(self, images, params, labels):
        """Record one step as a CUDA graph. The warm-up steps that this needs are undone."""
        self.inputs = [tensor.clone() for tensor in (images, params, labels)]
        before = [tensor.clone() for tensor in self._tensors()]

        def undo():
            for tensor, value in zip(self._tensors(), before):  # momentum that did not exist before comes last
                tensor.copy_(value)
            for tensor in self._tensors()[len(before):]:
                tensor.zero_()

        for attempt in ("compiled", "eager"):
            if attempt == "compiled" and self.net is self.model:
                continue
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    for _ in range(3):
                        self._update(*self.inputs)
                torch.cuda.current_stream().wait_stream(side)
                undo()
                graph = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(graph):
                    self._update(*self.inputs)
                undo()
                self.graph = graph
                return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler, driver or library that cannot: training goes on without
                reason = str(error).splitlines()[0][:100]
                print(f"no CUDA graph of the {attempt} step here ({reason}); trying the next slower way")
                torch.cuda.synchronize()
                undo()
                self.net = self.model
        self.graph_wanted = False

    def _tensors(self):
        """Every tensor that a step changes."""
        averaged = list(self.averaged.state_dict().values()) if self.averaged else []
        momentum = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return [*self.model.state_dict().values(), *averaged, *momentum]

    def _load_teacher(self, path):
        record = load_checkpoint(path)
        if record["config"]["classes"] != self.model.config["classes"]:
            raise ReidError(f"--teacher {path}: trained on other identities than this run; train it on the same --data_root")
        return restore_model(record, path).to(self.device).eval().requires_grad_(False)

    def _ask_teacher(self, x):
        with torch.no_grad(), self._autocast():
            size = (self.teacher.config["height"], self.teacher.config["width"])
            pooled = self.teacher.features(x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear"))
            neck = self.teacher.neck(pooled)
            return neck, self.teacher.classifier(neck)

    def end_epoch(self, first):
        """Metrics over the steps since `first`, after checking every loss: the one moment that waits for the device."""
        start = first % self.steps
        distributed.average_([self.losses])
        losses = self.losses[start:].cpu()
        bad = (~torch.isfinite(losses).all(1)).nonzero().flatten()
        if len(bad):
            step = first + int(bad[0])
            parts = ", ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in zip(PARTS, losses[bad[0]].tolist()))
            rate = learning_rate(step, self.steps, self.args)
            raise ReidError(f"the loss is not finite at step {step}, learning rate {rate:.4g}: {parts}; lower --lr or "
                            "lengthen --warmup_epochs (best.pth and last.pth are as before)")
        seen = losses[losses.abs().sum(1) > 0]
        metrics = dict(zip(PARTS, seen.mean(0).tolist())) if len(seen) else {}
        metrics["train/lr"] = learning_rate(first + max(0, len(seen) - 1), self.steps, self.args)
        if self.device.type == "cuda":
            metrics["train/memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.losses.zero_()
        distributed.average_([b for b in self.model.buffers() if b.is_floating_point() and b.ndim == 1])  # BN: each rank saw its part
        return metrics

    @property
    def best_model(self):
        """The weights that are evaluated and shipped: the averaged ones where there are any."""
        return self.averaged or self.model

    @torch.inference_mode()
    def validate(self, cache, labels):
        """Accuracy and cross-entropy of the classifier on images [N] it has not been trained on, exact for any world size."""
        model = self.best_model.eval()
        sums = torch.zeros(3, device=self.device, dtype=torch.float64)
        for rows in torch.arange(distributed.rank, len(cache), distributed.world_size).split(128):
            with self._autocast():
                logits = model.classifier(model.neck(model.features(cache[rows]))).float()
            truth = labels[rows].to(self.device)
            sums += torch.stack([F.cross_entropy(logits, truth, reduction="sum"), (logits.argmax(1) == truth).sum(),
                                 torch.tensor(len(rows), device=self.device)])
        loss, correct, count = distributed.total(sums).tolist()
        return {"val/accuracy": correct / count, "val/loss": loss / count}

    @torch.inference_mode()
    def embed(self, cache, labels, limit=1000):
        """Embeddings [n, D], labels [n] and images uint8 [n, 3, H, W] of whole identities, about `limit` images."""
        model = self.best_model.eval()
        rows = labels.argsort(stable=True)[:limit]
        images = torch.cat([cache[part].cpu() for part in rows.split(128)])
        parts = []
        for part in images.split(128):
            with self._autocast():
                parts.append(model(part.to(self.device)).float().cpu())
        return torch.cat(parts), labels[rows], images

    def state(self):
        """What exact resume needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "averaged": self.averaged.state_dict() if self.averaged else None,
                "rng": {"python": random.getstate(), "torch": torch.get_rng_state(),
                        "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None}}

    def load_state(self, weights, state):
        self.model.load_state_dict(weights)
        lr = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, value in zip(self.optimizer.param_groups, lr):
            group["lr"] = value  # a float on the CPU, a tensor on the GPU: the schedule fills it
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        random.setstate(state["rng"]["python"])
        torch.set_rng_state(state["rng"]["torch"])
        if state["rng"]["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
