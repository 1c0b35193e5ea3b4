"""What every test runs under: eight CPU devices, strict dtypes, no implicit rank promotion, checked shapes."""

import gc
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

hook = install_import_hook("grpo_jax", "beartype.beartype")
hook.__enter__()

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax.loop.compilation import processor

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # kept in the checkout, for all workers and for later sessions
    folder = Path(__file__).parent.parent / ".cache" / "jax-tests" / processor()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # for the processes that tests start
    jax.config.update("jax_compilation_cache_dir", str(folder))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
    "repository", deadline=None, max_examples=30, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("repository")


QUICK = " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """Compile the fast suite's programs quickly: compiling them as well as XLA can takes two fifths of its time.

    Both flags choose how machine code is made of a program; the program is the same. Slow tests measure speed and run
    long, and are compiled as a user's runs are.
    """
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] += QUICK  # read when the first array is made


def pytest_collection_finish():
    """Exempt all that was imported from garbage collection, and collect less often: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


@pytest.fixture
def empty_compilation_cache(tmp_path):
    """A compilation cache of the test's own, so that what it counts does not depend on earlier sessions."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system of a size, such as "2m", and gives its folder."""
    with ExitStack() as stack:

        def mount(size):
            folder = tmp_path / "disk"
            folder.mkdir()
            options = ["-t", "tmpfs", "-o", f"size={size}", "none", folder]
            if subprocess.run(["mount", *options], capture_output=True).returncode:
                pytest.skip("file systems cannot be mounted here")
            stack.callback(subprocess.run, ["umount", folder], check=True)
            return folder

        yield mount


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(params=[jax.jit, lambda function: function], ids=["jitted", "eager"])
def variant(request):
    """A function as it is and compiled, as ``chex.variants`` for pytest."""
    return request.param


TINY = {
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny():
    """A model of two layers and its parameters; weights large enough that a wrong mask or position shows."""
    from grpo_jax.models import build_model, from_hf_config, init_params

    config = from_hf_config(TINY)
    return build_model(config), init_params(config, jax.random.key(1))


GUESSING = {"skill_steps": 40, "skill_share": 0.0, "mixture_steps": 4, "worked_share": 0.0, "batch_size": 32}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base that only guesses, ``<answer>19</answer>``, right now and then: groups differ in their rewards."""
    from grpo_jax.tasks.toy_config import ToyConfig
    from grpo_jax.tasks.toy_model import make_toy_model

    folder = tmp_path_factory.mktemp("base") / "model"
    make_toy_model(folder, ToyConfig(**GUESSING))
    return str(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The embedded base with one layer that nothing was taught: what compiles fast."""
    from grpo_jax.models import from_hf_config, init_params, save_pretrained
    from grpo_jax.tasks.sums import make_tokenizer
    from grpo_jax.tasks.toy_config import HF_CONFIG, PROMPT_FORMAT

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    hf_config = {**HF_CONFIG, **sizes, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    folder = tmp_path_factory.mktemp("small") / "model"
    params = init_params(from_hf_config(hf_config), jax.random.key(0))
    save_pretrained(folder, params, hf_config=hf_config, tokenizer=make_tokenizer(), prompt_format=PROMPT_FORMAT)
    return str(folder)
