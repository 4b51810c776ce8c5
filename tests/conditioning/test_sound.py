"""Hidden states at the frames of a video against the official `AudioEncoder`."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from maxdiffusion.conditioning import sound
from maxdiffusion.errors import UserError
from maxdiffusion.media.samples import Samples
from maxdiffusion.models.wav2vec2.config import XLSR_53
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
