"""The command `prepare preview`: a picture of the first clips of a training run, as the model will see them."""

from microcinema.config.schema import PreparePreview
from microcinema.data.indexed import IndexedDataset
from microcinema.data.video_writer import write_contact_sheet


def run(config: PreparePreview) -> None:
    """Draws samples 0 to `max_samples - 1` of training, with the captions that the model reads; a UserError if the data set, or one of its
    clips, cannot be read."""
    clips = IndexedDataset(config.data.build(), config.seed)
    videos, captions = [], []
    for sample_index in range(config.max_samples):
        item = clips[sample_index]
        video = item["video"].permute(0, 2, 3, 1).numpy()
        frames, height, width = video.shape[:3]
        texts = dict.fromkeys(item[name] for name in ("caption", "description", "motion"))  # each text once
        shape = f"{frames} x {height} x {width}, {item['fps']:g} fps" if frames > 1 else f"picture, {height} x {width}"
        captions.append(f"{sample_index}  {item['id']}  ({shape}): {' | '.join(texts)}")
        videos.append(video)
    write_contact_sheet(config.output, videos, captions, columns=config.columns, below=True)
    print(config.output)
