"""The decoder, and loading and saving of Hugging Face checkpoints. The only package that imports flax."""

from grpo_jax.models.config import DecoderConfig as DecoderConfig
from grpo_jax.models.hf import Pretrained as Pretrained
from grpo_jax.models.hf import describe_pretrained as describe_pretrained
from grpo_jax.models.hf import from_pretrained as from_pretrained
from grpo_jax.models.hf import save_pretrained as save_pretrained
from grpo_jax.models.hf import weights_digest as weights_digest
from grpo_jax.models.hf_config import from_hf_config as from_hf_config
from grpo_jax.models.positions import num_positions as num_positions
from grpo_jax.models.transformer import build_model as build_model
from grpo_jax.models.transformer import init_params as init_params
from grpo_jax.models.transformer import param_shapes as param_shapes
