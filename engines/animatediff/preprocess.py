"""Text and keyframes to tensors: CLIP for the prompts, pixels or VAE latents for the keyframes."""

import hashlib
import re

import torch
from torch import Tensor

from engines.animatediff.checkpoint import clip_shape, load_known_words, load_text_encoder, load_tokenizer, load_vae, weights_of
from engines.animatediff.config import AnimateDiffConfig
from engines.animatediff.spec import AnimateDiffConditioning, AnimateDiffSpec, Keyframe, SparseControlInput
from engines.checkpoints.weights import torch_dtype
from engines.errors import blamed_on
from engines.media.decoder import DECODER
from engines.media.image import load_image, load_scribble
from engines.sampling import seeded_generator
from engines.spec import OnProgress, ShouldStop
from engines.stopping import stoppable

MOSTLY_BRIGHT = 0.5
"""Mean level above which a scribble is probably dark lines on white. It is used as it is, and the log says so."""


class Preprocess:
    """Holds the text encoder and the VAE's encoder."""

    def __init__(self, config: AnimateDiffConfig):
        DECODER.prepare()
        weights = weights_of(config)
        self.config = config
        self.shape = clip_shape(config)
        self.tokenizer = load_tokenizer(weights)
        self.known_words = load_known_words(weights)
        self.text_encoder = load_text_encoder(weights, torch_dtype(config.dtype)).to(config.device)
        self.vae = load_vae(weights, torch_dtype(config.dtype)).to(config.device)
        del self.vae.decoder, self.vae.post_quant_conv  # only the decode stage needs them

    @torch.inference_mode()
    def encode(
        self, spec: AnimateDiffSpec, *, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None
    ) -> AnimateDiffConditioning:
        """Encodes the prompts and the keyframes.

        on_progress: not called, as there are at most two prompts and three images. should_stop: called before each of them.
        Raises `ModelError` for an image that cannot be used, with the keyframe's field in its loc, and `Cancelled`.
        """
        generator = seeded_generator(spec.seed)
        # at guidance 1 the negative prompt has no effect, so it is not even encoded (5q)
        prompts = (spec.negative_prompt, spec.prompt) if spec.guidance_scale > 1 else (spec.prompt,)
        encoded = [self._text(prompt) for prompt in stoppable(prompts, should_stop)]
        text = torch.cat([embedding for embedding, _ in encoded])
        notes = [note for _, note in encoded if note]
        if unknown := self._unknown(spec.prompt):
            notes.append(f"this demo model does not know {unknown}; its words are {', '.join(self.known_words)}")
        control = self._control(spec, text, generator, should_stop, notes) if spec.keyframes else None
        return AnimateDiffConditioning(
            seed=spec.seed,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            rng_state=generator.get_state(),
            text=text,
            control=control,
            notes=tuple(notes),
        )

    def _text(self, prompt: str) -> tuple[Tensor, str]:
        """(1, 77, D) fp32: the last hidden state after the final norm. Also a note on what was cut off, empty if nothing was."""
        # Cut and padded by hand: the tokenizer stores both settings in itself, where another thread's call would change them
        limit, end, pad = self.tokenizer.model_max_length, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        given: list[int] = self.tokenizer(prompt, verbose=False).input_ids  # start, tokens, end
        kept = given if len(given) <= limit else [*given[: limit - 1], end]
        note = f"prompt cut to its first {limit - 2} of {len(given) - 2} tokens" if len(given) > limit else ""
        ids = torch.tensor([kept + [pad] * (limit - len(kept))], device=self.config.device)
        return self.text_encoder(ids).last_hidden_state.float().cpu(), note

    def _unknown(self, prompt: str) -> str:
        """The words of a prompt that a demo model does not know; empty for other models."""
        words = dict.fromkeys(re.findall(r"\w+", prompt.lower())) if self.known_words else ()
        return ", ".join(word for word in words if word not in self.known_words)

    def _control(
        self, spec: AnimateDiffSpec, text: Tensor, generator: torch.Generator, should_stop: ShouldStop | None, notes: list[str]
    ) -> SparseControlInput:
        """notes: gets one for each scribble that does not look like one."""
        keyframes = sorted(spec.keyframes, key=lambda keyframe: keyframe.index)  # so the noise does not depend on their order
        is_scribble = spec.controlnet_type == "scribble"
        images = torch.stack(
            [self._image(keyframe, is_scribble, should_stop) for keyframe in stoppable(keyframes, should_stop)]
        )  # (K, 3, H, W)
        values = images if is_scribble else self._latents(images, generator)
        if is_scribble:
            notes += [
                f"{keyframe.field} is mostly bright, so nearly all of it is taken for strokes: a scribble is white lines on black"
                for keyframe, image in zip(keyframes, images, strict=True)
                if image.mean() > MOSTLY_BRIGHT
            ]
        frames = tuple(keyframe.index for keyframe in keyframes)
        digest = hashlib.sha256(f"{spec.controlnet_type} {frames}".encode())
        digest.update(values.numpy().tobytes())
        digest.update(text.numpy().tobytes())
        return SparseControlInput(spec.controlnet_type, values, frames, digest.hexdigest())

    def _image(self, keyframe: Keyframe, is_scribble: bool, should_stop: ShouldStop | None) -> Tensor:
        load = load_scribble if is_scribble else load_image
        with blamed_on(keyframe.field):
            return load(keyframe.image, self.shape.height, self.shape.width, self.config.max_image_pixels, should_stop)

    def _latents(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A sample from the VAE's posterior, (K, 4, h, w) fp32. Its noise is the first that a request with RGB keyframes draws.

        diffusers draws it from the global generator, so there the same seed does not give the same video.
        """
        pixels = (2 * images - 1).to(self.config.device, torch_dtype(self.config.dtype))
        posterior = self.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        latents = (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor
        return latents.float().cpu()
