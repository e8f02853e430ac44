"""Attention by other libraries on the same CPU: ONNX Runtime, OpenVINO, JAX and ggml.

A library may have several implementations of attention. Each is a class below: it holds the operands in the library's
own tensors and layout, so that nothing is copied while it is timed, and uses the given number of threads. A problem
that it does not support raises Unsupported with a reason. fastest() takes the best implementation of a library. Used by
measure.py, which compares results with the reference before it times them. The packages are those of
requirements/peers.txt.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import os
import time

import numpy
import torch

PACKAGES = ("onnxruntime", "openvino", "jax", "ggml-python")
ROWS_OF_MASK = 64  # ggml reads its mask by blocks of so many queries


class Unsupported(Exception):
    """The reason why a library does not compute a problem."""


def need(condition, sentence):
    if not condition:
        raise Unsupported(sentence)


def load(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Unsupported("not installed") from None


def versions_of_peers():
    """Of those that are installed, on one line."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def rows_first(tensor):
    """(batch, head, row, column) as (batch, row, head, column), or the other way round."""
    return tensor.transpose(1, 2)


def array(tensor):
    """As dense numpy; bf16, which numpy does not know, as its bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Implementation:
    """One implementation in one library. Only run() is timed; results() converts what it returned to our results."""

    def __init__(self, problem, operands, threads):
        plain = problem.mask is None and not problem.window and not problem.softcap
        need(plain and (not problem.causal or problem.q_len == problem.kv_len), "only plain and causal are compared")
        need(problem.passes == "forward" or isinstance(self, Jax), "it computes no gradients")
        self.problem, self.threads = problem, threads
        self.build(operands.q.detach(), operands.k.detach(), operands.v.detach(), operands.d_o)

    def prepare(self):
        """Nothing to do: the constructor has built all."""

    def pack_gqa(self, q):
        """Q with the queries of a group as rows of one head, for a library that needs as many heads in K and V as in
        Q. Without a causal band the result of a query does not depend on its head."""
        grouped = self.problem.q_heads != self.problem.kv_heads
        need(not (grouped and self.problem.causal), "it has no causal attention with grouped queries")
        return q.reshape(self.problem.batch, self.problem.kv_heads, -1, self.problem.head_dim)

    def unpack_gqa(self, o):
        problem = self.problem
        return o.reshape(problem.batch, problem.q_heads, problem.q_len, problem.value_dim)


# --- ONNX Runtime --------------------------------------------------------------------------------


class OnnxRuntime(Implementation):
    """A model of one node. All that it reads and writes is bound beforehand; `shared` names outputs that live in the
    memory of an input."""

    def bind(self, operator, inputs, outputs, shared=None, domain="com.microsoft", **attributes):
        onnx, ort = load("onnx"), load("onnxruntime")
        element = {"f32": "FLOAT", "f16": "FLOAT16", "bf16": "BFLOAT16"}[self.problem.dtype]
        kind = getattr(onnx.TensorProto, element)

        def info(name, tensor):
            is_index = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else tensor
            return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32 if is_index else kind, shape)

        node = onnx.helper.make_node(operator, list(inputs), list(outputs), domain=domain, **attributes)
        infos = [[info(*one) for one in given.items()] for given in (inputs, outputs)]
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(
            onnx.helper.make_graph([node], operator, *infos), opset_imports=opsets, ir_version=10
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = self.threads, 1, 4
        options.add_session_config_entry("session.force_spinning_stop", "1")  # when a run is over: others come next
        try:
            self.session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:  # of many types
            need("NOT_IMPLEMENTED" not in str(error), f"it has no attention in {self.problem.dtype}")
            raise
        values = {name: ort.OrtValue.ortvalue_from_numpy(array(tensor)) for name, tensor in inputs.items()}
        numpy_type = array(next(iter(inputs.values()))).dtype.type
        for name, shape in outputs.items():
            source = (shared or {}).get(name)
            fresh = None if source else ort.OrtValue.ortvalue_from_shape_and_type(list(shape), numpy_type, "cpu")
            values[name] = values[source] if source else fresh
        self.binding, self.values = self.session.io_binding(), values
        for name in inputs:
            self.binding.bind_ortvalue_input(name, values[name])
        for name in outputs:
            self.binding.bind_ortvalue_output(name, values[name])

    def run(self):
        self.session.run_with_iobinding(self.binding)

    def output(self):
        return torch.from_numpy(self.values["O"].numpy())


def merged(tensor):
    """(batch, head, row, column) as (batch, row, head * column)."""
    return rows_first(tensor).flatten(2)


class MultiHeadAttention(OnnxRuntime):
    """The operator with a flash kernel, for f32 and no band."""

    def build(self, q, k, v, _d_o):
        problem, q = self.problem, merged(self.pack_gqa(q))
        shape = problem.batch, q.shape[1], problem.kv_heads * problem.value_dim
        options = {"num_heads": problem.kv_heads, "unidirectional": int(problem.causal)}
        self.bind("MultiHeadAttention", {"Q": q, "K": merged(k), "V": merged(v)}, {"O": shape}, **options)

    def results(self, _ran):
        o = self.output()
        return (self.unpack_gqa(rows_first(o.unflatten(2, (self.problem.kv_heads, -1)))),)


class GroupQueryAttention(OnnxRuntime):
    """The operator of language models: causal, K and V in a cache, to which the keys of the queries are added."""

    def build(self, q, k, v, _d_o):
        problem = self.problem
        prompt = problem.causal and problem.q_len == problem.kv_len
        need(prompt or problem.q_len == 1, "its GroupQueryAttention is causal")
        need(problem.head_dim == problem.value_dim, "its GroupQueryAttention has one head size")
        new_k, new_v = (merged(tensor[:, :, -problem.q_len :]) for tensor in (k, v))
        last = torch.full((problem.batch,), problem.kv_len - 1, dtype=torch.int32)
        total = torch.tensor([problem.kv_len], dtype=torch.int32)
        inputs = {"Q": merged(q), "K": new_k, "V": new_v, "past_K": k, "past_V": v, "last": last, "total": total}
        outputs = {"O": merged(q).shape, "all_K": k.shape, "all_V": v.shape}
        shared = {"all_K": "past_K", "all_V": "past_V"}
        heads = {"num_heads": problem.q_heads, "kv_num_heads": problem.kv_heads}
        self.bind("GroupQueryAttention", inputs, outputs, shared, **heads)

    def results(self, _ran):
        return (rows_first(self.output().unflatten(2, (self.problem.q_heads, -1))),)


class OnnxAttention(OnnxRuntime):
    """The operator of the ONNX standard."""

    def build(self, q, k, v, _d_o):
        shape = *q.shape[:3], self.problem.value_dim
        causal = int(self.problem.causal)
        self.bind("Attention", {"Q": q, "K": k, "V": v}, {"O": shape}, domain="", is_causal=causal)

    def results(self, _ran):
        return (self.output(),)


# --- OpenVINO ------------------------------------------------------------------------------------


class OpenVino(Implementation):
    """ScaledDotProductAttention in a compiled model. Its CPU plugin computes f16 in f32."""

    def build(self, q, k, v, _d_o):
        openvino, operators = load("openvino"), load("openvino.opset13")
        problem = self.problem
        kind = {"f32": openvino.Type.f32, "f16": openvino.Type.f16, "bf16": openvino.Type.bf16}[problem.dtype]
        given = [self.pack_gqa(q), k, v]
        parameters = [operators.parameter(list(tensor.shape), kind) for tensor in given]
        node = operators.scaled_dot_product_attention(*parameters, causal=problem.causal)
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if problem.dtype == "bf16" else "f32",
        }
        model = openvino.Model([node], parameters)
        self.request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        self.arrays = [array(tensor) for tensor in given]  # the tensors share their memory
        for n, data in enumerate(self.arrays):
            tensor = openvino.Tensor(data, list(data.shape), kind)
            self.request.set_input_tensor(n, tensor)

    def run(self):
        self.request.infer(share_outputs=True)

    def results(self, _ran):
        data = self.request.get_output_tensor(0).data
        is_bf16 = self.problem.dtype == "bf16"
        out = torch.from_numpy(numpy.array(data.view(numpy.uint16) if is_bf16 else data))
        return (self.unpack_gqa(out.view(torch.bfloat16) if is_bf16 else out),)


# --- JAX -----------------------------------------------------------------------------------------


class Jax(Implementation):
    """jax.nn.dot_product_attention, compiled; with gradients, its vector-Jacobian product."""

    def build(self, q, k, v, d_o):
        need(self.problem.passes != "backward", "its gradients come with the forward pass")
        need(self.problem.dtype != "f16", "its compiler has no f16 products on a CPU")
        os.environ["NPROC"] = str(self.threads)  # read when it starts; a process measures one problem
        jax = load("jax")
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=self.problem.causal)

        def train(q, k, v, d_o):
            o, gradients = jax.vjp(attend, q, k, v)
            return o, *gradients(d_o)

        def own(tensor):
            data = array(rows_first(tensor))
            return jax.numpy.asarray(data.view(jax.numpy.bfloat16) if self.problem.dtype == "bf16" else data)

        forward = self.problem.passes == "forward"
        self.operands = [own(tensor) for tensor in ((q, k, v) if forward else (q, k, v, d_o))]
        self.function = jax.jit((lambda *given: (attend(*given),)) if forward else train)
        self.wait = jax.block_until_ready

    def run(self):
        return self.wait(self.function(*self.operands))

    def results(self, ran):
        return tuple(rows_first(torch.from_numpy(numpy.array(one.astype("float32")))) for one in ran)


# --- ggml ----------------------------------------------------------------------------------------


class Ggml(Implementation):
    """ggml_flash_attn_ext as a graph of its own. Q is f32 there, and a causal band a mask."""

    def build(self, q, k, v, _d_o):
        self.ggml, problem = load("ggml"), self.problem
        ggml = self.ggml
        kinds = {"f32": ggml.GGML_TYPE_F32, "f16": ggml.GGML_TYPE_F16, "bf16": ggml.GGML_TYPE_BF16}
        mask = self.mask() if problem.causal else None
        given = [tensor for tensor in (q.float(), k, v, mask) if tensor is not None]
        size = sum(tensor.nbytes for tensor in given) + 4 * problem.q_heads * problem.batch * problem.q_len * v.shape[3]
        size += 1 << 20  # their descriptions, and the graph
        self.context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=False))

        tensors = [self.own(q.float(), kinds["f32"]), *(self.cached(one, kinds[problem.dtype]) for one in (k, v))]
        tensors.append(None if mask is None else self.own(mask, kinds["f16"]))
        self.out = ggml.ggml_flash_attn_ext(self.context, *tensors, problem.head_dim**-0.5, 0.0, 0.0)
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, self.out)
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, self.threads)

    def own(self, tensor, kind):
        """A tensor of ggml's with a copy of these bytes."""
        made = self.ggml.ggml_new_tensor_4d(self.context, kind, *reversed(tensor.shape))
        data = array(tensor)
        ctypes.memmove(self.ggml.ggml_get_data(made), data.ctypes.data, data.nbytes)
        return made

    def cached(self, tensor, kind):
        """K or V."""
        return self.own(tensor, kind)

    def mask(self):
        rows = -(-self.problem.q_len // ROWS_OF_MASK) * ROWS_OF_MASK
        hidden = ~self.problem.band(range(rows))
        return torch.zeros(1, 1, rows, self.problem.kv_len, dtype=torch.float16).masked_fill(hidden, -torch.inf)

    def run(self):
        status = self.ggml.ggml_backend_graph_compute(self.backend, self.graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def results(self, _ran):
        problem = self.problem
        shape = problem.batch, problem.q_len, problem.q_heads, problem.value_dim
        floats = (ctypes.c_float * numpy.prod(shape)).from_address(self.ggml.ggml_get_data(self.out))
        return (rows_first(torch.from_numpy(numpy.array(floats)).reshape(shape)),)


class GgmlCodes(Ggml):
    """The same on K and V in blocks of codes, such as "Q8_0"."""

    def __init__(self, kind, *rest):
        self.kind = kind
        super().__init__(*rest)

    def cached(self, tensor, _kind):
        ggml, kind = self.ggml, getattr(self.ggml, f"GGML_TYPE_{self.kind}")
        numbers = tensor.float().contiguous()
        made = ggml.ggml_new_tensor_4d(self.context, kind, *reversed(tensor.shape))
        floats = ctypes.cast(numbers.data_ptr(), ctypes.POINTER(ctypes.c_float))
        rows, columns = numbers.numel() // numbers.shape[-1], numbers.shape[-1]
        ggml.ggml_quantize_chunk(kind, floats, ggml.ggml_get_data(made), 0, rows, columns, None)
        return made


# --- All -----------------------------------------------------------------------------------------

IMPLEMENTATIONS = {
    "onnxruntime": (MultiHeadAttention, GroupQueryAttention, OnnxAttention),
    "openvino": (OpenVino,),
    "jax": (Jax,),
    "ggml": (Ggml,),
}
PEERS = tuple(IMPLEMENTATIONS)


def fastest(library, problem, operands, threads):
    """(the fastest implementation of this library, its seconds, its results). Raises Unsupported if there is none."""
    found, reasons = [], []
    for implementation in IMPLEMENTATIONS[library]:
        try:
            one = implementation(problem, operands, threads)
        except Unsupported as error:
            reasons.append(str(error))
            continue
        one.run()
        begin = time.perf_counter()
        ran = one.run()
        found.append((one, time.perf_counter() - begin, ran))
    need(found, "; ".join(dict.fromkeys(reasons)))
    best, seconds, ran = min(found, key=lambda entry: entry[1])
    return best, seconds, best.results(ran)
