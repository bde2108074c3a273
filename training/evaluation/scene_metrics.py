"""The judge of captions of drawn scenes: their parser, their classes, and the texts that search for these."""

from mmgem.training.evaluation.metrics import CaptionJudge
from mmgem.training.scenes.caption_parser import parse_caption, parse_region_caption
from mmgem.training.scenes.captions import label_prompt
from mmgem.training.scenes.drawing import LABELS

# Captions that are not of scenes do not parse, so that other data is evaluated with it as without.
SCENE_JUDGE = CaptionJudge(parse_caption, parse_region_caption, LABELS, label_prompt)
