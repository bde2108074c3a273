"""CIDEr-D of captions one by one, as a reward: words weigh by how many images of the training data have them."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from mmgem.training.evaluation.caption_words import caption_words

LONGEST = 4  # n-grams
LENGTH_DEVIATION = 6.0  # of the Gaussian that punishes another length than the reference has
END = "<end>"  # is a word too, or captions would learn to stop in the middle of a phrase


class CaptionReward:
    """CIDEr-D (Vedantam et al., 2015, arXiv:1411.5726) of single captions, with their ends as words.

    [`mmgem.training.evaluation.metrics.cider`] takes the weights of words from the captions that it is given, which
    are all there are. Here they are those of a corpus, and captions come a few at a time.

    Args:
        corpus: The reference captions of each image, of at least two images.

    Raises:
        ValueError: If there are fewer than two images: every word is then in all of them, and weighs nothing.
    """

    def __init__(self, corpus: Iterable[Sequence[str]]):
        self._images_with: Counter[tuple[str, ...]] = Counter()
        num_images = 0
        for captions in corpus:
            self._images_with.update({phrase for caption in captions for phrase in _phrases(caption, is_whole=True)})
            num_images += 1
        if num_images < 2:
            raise ValueError(f"`corpus` has captions of {num_images} images; expected 2 or more.")
        self._log_images = math.log(num_images)

    def __call__(self, captions: Sequence[str], are_whole: Sequence[bool], references: Sequence[str]) -> list[float]:
        """Compare captions of one image with its references.

        Args:
            captions: The captions.
            are_whole: Whether each of them came to its end.
            references: At least one.

        Returns:
            For each caption its CIDEr-D, 0 to 10.
        """
        originals = [self._weigh(_phrases(reference, is_whole=True)) for reference in references]
        rewards = []
        for caption, is_whole in zip(captions, are_whole, strict=True):
            own = self._weigh(_phrases(caption, is_whole))
            rewards.append(10 * sum(_similarity(own, original) for original in originals) / len(originals))
        return rewards

    def _weigh(self, phrases: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """TF-IDF weights of phrases, the length of the vector of those of each number of words, and words in all."""
        weights, squares, num_words = {}, [0.0] * LONGEST, 0
        for phrase, count in phrases.items():
            weight = count * (self._log_images - math.log(max(1, self._images_with[phrase])))
            weights[phrase] = weight
            squares[len(phrase) - 1] += weight**2
            num_words += count if len(phrase) == 1 else 0
        return weights, [math.sqrt(square) for square in squares], num_words


def _phrases(caption: str, is_whole: bool) -> Counter[tuple[str, ...]]:
    words = [*caption_words(caption).split(), *([END] if is_whole else [])]
    lengths = range(1, LONGEST + 1)
    return Counter(tuple(words[start : start + n]) for n in lengths for start in range(len(words) - n + 1))


def _similarity(own, original) -> float:
    (weights, lengths, num_words), (original_weights, original_lengths, original_words) = own, original
    products = [0.0] * LONGEST
    for phrase, weight in weights.items():
        if other := original_weights.get(phrase):
            products[len(phrase) - 1] += min(weight, other) * other  # a word that is repeated counts once
    cosines = [
        product / (length * other) if length and other else 0.0
        for product, length, other in zip(products, lengths, original_lengths, strict=True)
    ]
    return sum(cosines) / LONGEST * math.exp(-((num_words - original_words) ** 2) / (2 * LENGTH_DEVIATION**2))
