"""The module s3prl's runner imports; the expert itself lives in :mod:`s3prl_metaperser.expert`."""

from s3prl_metaperser.expert import DownstreamExpert as DownstreamExpert
