"""The words of captions, as the tokenizer of the COCO evaluation cuts them: the Penn Treebank's, without punctuation.

That one needs Java (`pycocoevalcap.tokenizer`). On the 5,000 English captions of Flickr8k's validation split both give
the same words.
"""

import re

_CLITIC = r"(?:s|m|d|ll|re|ve)\b"
_WORD = re.compile(
    r"(?:[a-z]\.){2,}"  # p.m.
    r"|(?:mrs?|ms|dr|st|no|vs|jr|sr)\.(?=\s)"
    r"|can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b)"
    r"|\w+?(?=n't\b)|n't\b"
    rf"|'(?:{_CLITIC}|\d0s\b)"
    rf"|[\w@]+(?:(?:[-./,:@]|'(?!{_CLITIC}))[\w@]+)*"  # t-shirt, 5:30, o'neil
    r"|[()&$%#+=*/<>]"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-"}


def caption_words(text: str) -> str:
    """Return the words of a caption in lower case, with a space between them."""
    words = _WORD.findall(text.lower().replace("\u2019", "'").replace("\u2018", "'"))
    return " ".join(_BRACKETS.get(word, word) for word in words)
