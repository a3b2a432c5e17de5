"""How a pair of launchers, forward and backward, becomes an op: registered with torch.library, and directly callable.

The registered form (`torch.ops.effbert.NAME`) is what torch.compile, fake tensors and opcheck see. Eager calls on plain
tensors take the direct path, one autograd.Function, because the dispatcher costs a Python custom op more than a small
kernel lasts. Both run the same two functions.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd import forward_ad

NAMESPACE = "effbert"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_in_place = contextvars.ContextVar("gradients_in_place", default=False)


@contextlib.contextmanager
def gradients_in_place() -> Iterator[None]:
    """Ops called inside add their weights' gradients to `.grad` themselves, where they can, once backward runs.

    A candidate that uses a slice of its parent's weight then touches that slice only; autograd's own way fills a tensor
    of the parent's size with zeros for each op. It holds for eager calls of this thread whose weights are leaf tensors,
    each another one, that require a gradient and have no gradient hooks (an op with others gets its gradients in
    autograd's own way), and for `loss.backward()`, not for `torch.autograd.grad`. A wrapper that hooks on to what
    accumulates gradients (DistributedDataParallel) must not be used inside.
    """
    before = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(before)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """`parameter.grad` with contiguous columns, made of zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    elif parameter.grad.stride(-1) != 1:
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


class FusedOp:
    """One op with a gradient.

    name: becomes effbert::name, its backward effbert::name_backward.
    forward(*args) -> tuple of tensors. Annotated with what a torch.library schema knows (Tensor, Tensor | None,
        list[Tensor], int, float, bool, str). The first `results` outputs are the op's; the others are kept for
        backward. Its last argument is `need_grad: bool`, filled in by the call; where False nothing need be kept:
        outputs for backward are then empty tensors.
    fake(*args): the same outputs, empty: shapes, strides, dtypes and devices.
    backward(grads, kept, *args) -> list of tensors, the gradients of the `differentiable` arguments, a list[Tensor]
        argument giving as many as it has. grads: list of the gradients of the results; kept: list of the outputs kept.
    backward_fake: the same, empty.
    differentiable: names of the arguments that get gradients.
    keep_results: whether `kept` begins with the results themselves, saved but not copied.
    in_place: names of those that backward(..., in_place=True) adds to `.grad` itself, returning None for them; see
        `gradients_in_place`.
    """

    def __init__(
        self,
        name: str,
        forward: Callable,
        fake: Callable,
        backward: Callable,
        backward_fake: Callable,
        differentiable: Sequence[str],
        results: int = 1,
        keep_results: bool = False,
        in_place: Sequence[str] = (),
    ):
        self.first_kept = 0 if keep_results else results
        self.name, self.forward, self.backward, self.results = name, forward, backward, results
        schema = torch.library.infer_schema(forward, mutates_args=())
        arguments = schema[1 : schema.index(") -> ")]
        self.names = [argument.split()[-1].split("=")[0] for argument in arguments.split(", ")]
        self.differentiable = tuple(self.names.index(argument) for argument in differentiable)
        self.in_place = tuple(self.names.index(argument) for argument in in_place)
        self._define(name, schema, forward, fake)
        backward_schema = f"(Tensor[] grads, Tensor[] kept, {arguments}) -> Tensor[]"
        self._define(f"{name}_backward", backward_schema, backward, backward_fake)
        self._registered = getattr(torch.ops.effbert, name).default
        self._registered_backward = getattr(torch.ops.effbert, f"{name}_backward").default
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", self._backward_of_registered, setup_context=self._keep_of_registered
        )
        torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", self._refuse_double_backward)

    def _define(self, name, schema, function, fake):
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        torch.library.register_fake(qualified, fake)

    def __call__(self, *args):
        """Run on `args`, all but need_grad: the result, or the tuple of results where there are several."""
        tensors = [value for value in _flat(args) if isinstance(value, torch.Tensor)]
        need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if not torch.compiler.is_compiling():
            _refuse_transforms(self.name, tensors)
        if torch.compiler.is_compiling() or any(type(tensor) not in _PLAIN for tensor in tensors):
            outputs = self._registered(*args, need_grad)[: self.results]
        elif need_grad:
            outputs = _Direct.apply(self, _lengths(args), *_flat(args))
        else:
            outputs = self.forward(*args, False)[: self.results]
        return outputs if self.results > 1 else outputs[0]

    def _place(self, args, gradients) -> list:
        """`gradients` at the places of their arguments among all args (need_grad too), None at the others."""
        gradients = iter(gradients)

        def of(index, arg):
            many = isinstance(arg, (list, tuple))
            if index in self.differentiable:
                return list(itertools.islice(gradients, len(arg))) if many else next(gradients)
            return [None] * len(arg) if many else None

        return [of(index, arg) for index, arg in enumerate(args)]

    def _keep_of_registered(self, ctx, inputs, output):
        ctx.mark_non_differentiable(*output[self.results :])
        _remember(ctx, inputs, output[self.first_kept :])

    def _backward_of_registered(self, ctx, *grads):
        args, kept = _recall(ctx)
        return tuple(self._place(args, self._registered_backward(list(grads[: self.results]), kept, *args)))

    def _refuse_double_backward(self, ctx, *grads):
        raise RuntimeError(_double_backward_message(self.name))


class _Direct(torch.autograd.Function):
    """The eager call of a FusedOp whose result needs a gradient."""

    @staticmethod
    def forward(ctx, op, lengths, *flat):
        args = (*_nested(flat, lengths), True)
        outputs = op.forward(*args)
        ctx.op = op
        ctx.leaves = ()
        if _in_place.get() and op.in_place:
            leaves = [args[index] for index in op.in_place]
            alone = len({id(leaf) for leaf in leaves}) == len(leaves)  # else programs would add to one `.grad` at once
            ctx.leaves = leaves if alone and all(map(_is_plain_leaf, leaves)) else ()
        _remember(ctx, args, outputs[op.first_kept :])
        return tuple(outputs[: op.results])

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(_double_backward_message(ctx.op.name))
        args, kept = _recall(ctx)
        for index, leaf in zip(ctx.op.in_place, ctx.leaves, strict=False):  # saved tensors may come back as copies
            args[index] = leaf
        options = {"in_place": True} if ctx.leaves else {}
        gradients = ctx.op.backward(list(grads), kept, *args, **options)
        return (None, None, *_flat(ctx.op._place(args, gradients)[:-1]))


def _is_plain_leaf(tensor: torch.Tensor) -> bool:
    hooked = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    return tensor.is_leaf and tensor.requires_grad and not hooked


def _refuse_transforms(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """RuntimeError inside torch.func and vmap, and for tensors with a forward-mode tangent, which would be lost."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    if not inside and forward_ad._current_level >= 0:
        inside = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if inside:
        raise RuntimeError(
            f"{name}: the fused kernels know neither torch.func, vmap nor forward mode; use_backend('eager') does"
        )


def _double_backward_message(name: str) -> str:
    return f"{name}: the fused kernels have no second derivative; use_backend('eager') has one"


def _remember(ctx, args, kept) -> None:
    flat = _flat(args)
    ctx.lengths = _lengths(args)
    ctx.constants = [None if isinstance(value, torch.Tensor) else value for value in flat]
    ctx.tensor_places = [place for place, value in enumerate(flat) if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*(flat[place] for place in ctx.tensor_places), *kept)


def _recall(ctx) -> tuple[list, list[torch.Tensor]]:
    flat, saved = list(ctx.constants), list(ctx.saved_tensors)
    for place, tensor in zip(ctx.tensor_places, saved, strict=False):
        flat[place] = tensor
    return _nested(flat, ctx.lengths), saved[len(ctx.tensor_places) :]


def _lengths(args) -> list[int | None]:
    return [len(arg) if isinstance(arg, (list, tuple)) else None for arg in args]


def _flat(args) -> list:
    return [value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,))]


def _nested(flat, lengths) -> list:
    values = iter(flat)
    return [next(values) if length is None else list(itertools.islice(values, length)) for length in lengths]
