"""Run a script's main() on a card that exists only in this process, to find mixed devices without a GPU.

    python tests/emulated_card.py tgpo --model ... --teacher ...    # the script's own command line

A tensor on the card is a `Card`. It holds an ordinary tensor, and it refuses what CUDA refuses: an operation
that also takes a tensor of the host, and numpy. The card is torch's free device type, PrivateUse1, under the
name "card". So torch itself knows that it is another device, in `.to`, `torch.zeros(device=)` and autograd.

Nothing watches operations on the host, and no function of torch is replaced. transformers needs both: it
builds a model on the meta device, which it recognises by `torch.tensor([]).device`. If that says "cpu",
it leaves the rotary frequencies uninitialised.

Limits: code behind `device.type == "cuda"` does not run; there are no streams, no memory limit, no CUDA
kernels and no FSDP2; autocast casts the operations in CAST_BY_AUTOCAST only.
"""
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule, _setup_privateuseone_for_python_backend)

ROOT = Path(__file__).resolve().parent.parent
CARD = torch.device("privateuseone", 0)
MAY_MIX = {"aten::copy_", "aten::_to_copy"}  # they move data between host and card
TAKE_HOST_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
NO_HOST_SCALARS = {"aten::cat", "aten::stack"}  # elsewhere CUDA accepts a host tensor without dimensions
CAST_BY_AUTOCAST = ("linear", "matmul", "scaled_dot_product_attention")


class Mixed(RuntimeError):
    """An operation took tensors of the host and of the card, or gave a card's tensor to numpy."""


class Card(torch.Tensor):
    """A tensor on the emulated card. Its values are those of `host`."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=CARD)

    def __init__(self, host: torch.Tensor):
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check_devices(operation, args, kwargs)
        host_kwargs = tree_map(to_host, kwargs)
        if "device" in kwargs:
            host_kwargs["device"] = torch.device("cpu")
        result = operation(*tree_map(to_host, args), **host_kwargs)
        if operation._schema.is_mutable:
            return written_argument(operation, args, kwargs)
        if kwargs.get("device", CARD) == torch.device("cpu"):
            return result
        return tree_map(to_card, result)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def untyped_storage(self):  # transformers finds tied weights by their storage
        return self.host.untyped_storage()

    def tolist(self):
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        raise Mixed(f"numpy needs a tensor of the host, at {our_line()}")

    __array__ = numpy

    def __repr__(self, **kwargs) -> str:
        return f"Card({self.host})"


def to_host(value):
    return value.host if isinstance(value, Card) else value


def to_card(value):
    return Card(value) if is_on_host(value) else value


def is_on_host(value) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, Card)


def written_argument(operation, args: tuple, kwargs: dict):
    """Return the arguments that an in-place operation has changed, as the operation itself would."""
    written = []
    for i, argument in enumerate(operation._schema.arguments):
        if argument.is_write:
            written.append(args[i] if i < len(args) else kwargs[argument.name])
    for tensor in tree_leaves(written):
        if tensor.shape != to_host(tensor).shape:
            raise NotImplementedError(f"{operation} changes the shape of a tensor on the card")
    if not operation._schema.returns:
        return None
    return written[0] if len(written) == 1 else tuple(written)


def our_line() -> str:
    """Return the innermost line of the project's scripts that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).parent == ROOT:
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    return "no line of ours: a backward pass, or a test"


def check_devices(operation, args: tuple, kwargs: dict) -> None:
    """Refuse an operation on the card that takes a tensor of the host, as CUDA does."""
    name = operation._schema.name
    if name in MAY_MIX:
        return
    checked = args
    if name in TAKE_HOST_INDICES and isinstance(args[0], Card):
        checked = args[2:3]
    for value in tree_leaves((checked, kwargs)):
        if is_on_host(value) and (value.ndim > 0 or name in NO_HOST_SCALARS):
            raise Mixed(f"{name} takes tensors of the card and of the host, at {our_line()}")


# ---------------------------------------------------------------- the card as a device of torch

def new_tensor(size, dtype=None, **_) -> Card:
    return Card(torch.empty(size, dtype=dtype))


def new_strided_tensor(size, stride, dtype=None, **_) -> Card:
    return Card(torch.empty_strided(size, stride, dtype=dtype))


def new_range(*limits, dtype=None, **_) -> Card:
    return Card(torch.arange(*limits, dtype=dtype))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    to_host(target).copy_(to_host(source))
    return target


def to_bf16(value):
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16() if is_float else value


def cast_inputs(operation):
    """Return the operation with its inputs cast to bf16, as autocast does it."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast_operation(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operation(*map(to_bf16, args), **tree_map(to_bf16, kwargs))

    return cast_operation


class CardModule(_DummyBackendModule):
    """What torch looks up as `torch.card`: the type of autocast, and streams that do nothing."""
    only_stream = SimpleNamespace(synchronize=lambda: None)

    def get_amp_supported_dtype(self) -> list:
        return [torch.bfloat16]

    def current_stream(self) -> SimpleNamespace:
        return self.only_stream

    def stream(self, stream: SimpleNamespace):
        return nullcontext()


LIBRARIES = []  # what is registered in a library goes when the library goes


def install() -> None:
    """Teach torch the device, for the life of the process."""
    _setup_privateuseone_for_python_backend("card", CardModule())
    aten = torch.library.Library("aten", "IMPL")
    every = torch.library.Library("_", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten.impl("empty.memory_format", new_tensor, "PrivateUse1")
    aten.impl("empty_strided", new_strided_tensor, "PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step"):
        aten.impl(name, new_range, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")  # torch.tensor comes here, past `Card`
    aten.impl("_local_scalar_dense", lambda tensor: tensor.host.item(), "PrivateUse1")
    for name in CAST_BY_AUTOCAST:
        operation = getattr(torch.ops.aten, name).default
        aten.impl(name, cast_inputs(operation), "AutocastPrivateUse1")
    LIBRARIES.extend([aten, every])
    torch.__future__.set_swap_module_params_on_conversion(True)  # keeps tied weights tied, as on a real card


def use_in_scripts() -> None:
    """Let common.py take the card for its GPU."""
    import common
    load_model = common.load_model

    def load_in_bf16(name, flag="--model", dtype=torch.bfloat16, device=None):
        return load_model(name, flag, dtype, device)

    common.load_model = load_in_bf16  # the default dtype on a GPU
    common.ON_GPU = True
    common.DEVICE = CARD
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(total_memory=80 * 2 ** 30)
    torch.cuda.get_device_name = lambda: "emulated"
    torch.cuda.max_memory_allocated = lambda: 0


def main() -> None:
    """Run a script with the given command line; behind "then" stand flags of a second run after the first."""
    install()
    sys.path.insert(0, str(ROOT))
    use_in_scripts()
    script, *first = sys.argv[1:]
    then = first.index("then") if "then" in first else len(first)
    more = first[then + 1:]
    sys.argv = [f"{script}.py", *first[:then]]
    __import__(script).main()
    if more:
        sys.argv += more
        __import__(script).main()


if __name__ == "__main__":
    main()
