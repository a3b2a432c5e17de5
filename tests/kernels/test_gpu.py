"""What only a GPU can show: CUDA graphs, no wait for the host, peak memory, and that auto takes the kernels there."""

import pytest
import torch

from effbert import kernels
from effbert.kernels import Dropout, Expression, eager

pytestmark = pytest.mark.gpu

EXPRESSION = Expression.parse("linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2)")


def block_operands(rows=4096, channels=540):
    shapes = [(rows, channels), (channels, channels), (channels,), (channels, channels), (channels,)]
    scales = [1.0, channels**-0.5, 0.1, channels**-0.5, 0.1]
    tensors = [torch.randn(shape, device="cuda") * scale for shape, scale in zip(shapes, scales, strict=True)]
    tensors += [torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")]
    return [tensor.bfloat16().requires_grad_() for tensor in tensors]


def heads(batch, length, size, dtype=torch.bfloat16, grad=True):
    x = torch.randn(batch, length, 12 * size, device="cuda").to(dtype).unflatten(-1, (12, size)).transpose(1, 2)
    return x.detach().requires_grad_(grad)


def test_auto_takes_the_kernels():
    logits = torch.randn(8, 3, device="cuda", requires_grad=True)
    loss = kernels.soft_cross_entropy(logits, logits.detach().flip(1))
    assert "_Direct" in type(loss.grad_fn).__name__


def test_a_captured_block_draws_new_masks_from_its_key_tensor():
    operands = block_operands()
    key = torch.tensor(11, device="cuda")

    def step():
        return kernels.mlp_block(*operands, EXPRESSION, 270, 1e-5, Dropout(0.1, key, 3), backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    for operand in operands:
        operand.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
        output.float().square().sum().backward()
    for value in (11, 2**61 + 5):
        key.fill_(value)
        graph.replay()
        replayed = [output.clone(), *(operand.grad.clone() for operand in operands)]
        leaves = [operand.detach().requires_grad_() for operand in operands]
        expected = kernels.mlp_block(*leaves, EXPRESSION, 270, 1e-5, Dropout(0.1, value, 3), backend="triton")
        expected.float().square().sum().backward()
        for mine, theirs in zip(replayed, [expected, *(leaf.grad for leaf in leaves)], strict=True):
            assert torch.equal(mine, theirs)


def test_no_op_waits_for_the_device():
    operands = block_operands(512)
    query, key, value = (heads(4, 64, 45) for _ in range(3))
    teacher_query, teacher_key = (heads(4, 64, 64, grad=False) for _ in range(2))
    mask = torch.ones(4, 64, dtype=torch.int64, device="cuda")
    states = [torch.randn(4, 64, 540, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    targets = [torch.randn(4, 64, 768, device="cuda").bfloat16() for _ in range(3)]
    weight, bias = torch.randn(768, 540, device="cuda").requires_grad_(), torch.zeros(768, device="cuda")

    def everything():
        y = kernels.mlp_block(*operands, EXPRESSION, 270, 1e-5, Dropout(0.1, 7, 1))
        context, loss = kernels.distill_attention(query, key, value, teacher_query, teacher_key, mask)
        total = loss + kernels.score_mse(query, key, teacher_query, teacher_key, mask)
        total = total + kernels.projected_mse(states, targets, weight, bias.requires_grad_(), mask)
        (total + y.float().sum() + context.float().sum()).backward()

    with kernels.use_backend("triton"):
        everything()
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_score_loss_needs_a_tenth_of_the_memory_at_512_positions():
    def extra(loss):
        student = [heads(8, 512, 45) for _ in range(2)]
        teacher = [heads(8, 512, 64, grad=False) for _ in range(2)]
        mask = torch.ones(8, 512, dtype=torch.int64, device="cuda")
        loss(*student, *teacher, mask).backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(*student, *teacher, mask).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    materialised = extra(lambda *args: eager.score_mse(*args, form="direct"))
    assert extra(lambda *args: kernels.score_mse(*args, backend="triton")) < materialised / 10


def test_rows_beyond_32_bit_offsets_are_reached():
    columns = 4096
    rows = 2**31 // columns + 8
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * columns:
        pytest.skip("needs 21 GB of free GPU memory")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(columns, device="cuda") / columns
    weight, bias = (torch.full((columns,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 0.0))
    out = kernels.dropout_add_layer_norm(x, x, weight, bias, 1e-5, backend="triton")
    torch.testing.assert_close(out[-1], eager.dropout_add_layer_norm(x[-1:], x[-1:], weight, bias, 1e-5)[0])
