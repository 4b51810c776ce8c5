"""Hidden states at the frames of a video against the official `AudioEncoder`."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from maxdiffusion.conditioning import sound
from maxdiffusion.errors import UserError
from maxdiffusion.media.samples import Samples
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.wav2vec2.config import SAMPLE_RATE, XLSR_53, Wav2Vec2Config
from maxdiffusion.models.wav2vec2.encoder import Wav2Vec2
from tests.support import official
from tests.support.parity import relative_error


@pytest.mark.parametrize("states", [7, 115, 249, 252, 430])
def test_the_states_of_each_frame_match_the_reference(states):
    module = official.load("modules.s2v.audio_encoder")
    encoder = module.AudioEncoder.__new__(module.AudioEncoder)  # without its network
    encoder.video_rate = 30
    hidden = np.random.default_rng(states).standard_normal((3, states, 5), dtype=np.float32)
    resampled = module.linear_interpolation(torch.from_numpy(hidden), 50, encoder.video_rate)
    theirs, clips = encoder.get_audio_embed_bucket_fps(resampled, fps=16, batch_frames=80, m=0)
    assert sound.clips(states, 50.0, Fraction(16), 80) == clips
    ours = sound.at_frames(jnp.asarray(hidden), 50.0, Fraction(16), 80 * clips)
    assert relative_error(ours, theirs.transpose(0, 1)) < 1e-4


@pytest.mark.parametrize(("samples", "enough"), [(0, False), (719, False), (720, True)])
def test_too_short_a_sound_is_refused(samples, enough):
    given = Samples(np.zeros(samples, np.float32), 16000, "pcm")
    if enough:
        sound.check_length("a.wav", given, XLSR_53)
    else:
        with pytest.raises(UserError, match=r"a\.wav has .* s of sound"):
            sound.check_length("a.wav", given, XLSR_53)


TINY = Wav2Vec2Config(10, 12, 24, 2, conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)


@pytest.mark.parametrize(("config", "gib"), [(TINY, 0.3), (XLSR_53, 3.0)], ids=["tiny", "published"])
def test_ten_minutes_of_sound_take_little_memory(config, gib):
    """For a clip of 80 frames. Measured as compiled for a CPU: 0.24 and 2.6 GiB beside the parameters."""
    net = nnx.split(nnx.eval_shape(lambda: Wav2Vec2(config, Dtypes())))
    samples = jax.ShapeDtypeStruct((1, 600 * SAMPLE_RATE), jnp.float32)
    compiled = sound.program().lower(*net, samples, Fraction(16), 80).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < gib * 2**30
