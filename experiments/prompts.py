"""ImageNet-style prompts: class names in OpenAI's templates.

The templates are the 18 that OpenAI publishes for CIFAR-10 and CIFAR-100 (https://github.com/openai/CLIP,
`data/prompts.md`), which are also among its 80 for ImageNet.  The names are 100 of ImageNet's classes as OpenAI's notebook
"Prompt Engineering for ImageNet" writes them.
"""
TEMPLATES = (
    "a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.", "a low contrast photo of a {}.", "a high contrast photo of a {}.",
    "a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.", "a photo of a big {}.",
    "a photo of the {}.", "a blurry photo of the {}.", "a black and white photo of the {}.", "a low contrast photo of the {}.", "a high contrast photo of the {}.",
    "a bad photo of the {}.", "a good photo of the {}.", "a photo of the small {}.", "a photo of the big {}.",
)

CLASSES = (
    "tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark", "electric ray", "stingray", "rooster", "hen", "ostrich",
    "brambling", "goldfinch", "house finch", "junco", "indigo bunting", "American robin", "bulbul", "jay", "magpie", "chickadee",
    "American dipper", "kite (bird of prey)", "bald eagle", "vulture", "great grey owl", "fire salamander", "smooth newt", "American bullfrog", "tree frog",
    "leatherback sea turtle", "box turtle", "banded gecko", "green iguana", "Komodo dragon", "Nile crocodile", "American alligator", "triceratops",
    "garter snake", "boa constrictor", "tarantula", "centipede", "peacock", "hummingbird", "toucan", "goose", "black swan", "wombat", "jellyfish", "snail",
    "flamingo", "king penguin", "grey whale", "Chihuahua", "Yorkshire Terrier", "Golden Retriever", "Labrador Retriever", "German Shepherd Dog", "Siberian Husky",
    "tabby cat", "Siamese cat", "lion", "tiger", "polar bear", "ladybug", "monarch butterfly", "hedgehog", "zebra", "hippopotamus", "African bush elephant",
    "giant panda", "acoustic guitar", "airliner", "analog clock", "backpack", "balloon", "baseball player", "bicycle-built-for-two", "bookcase", "cash machine",
    "cellular telephone", "coffee mug", "desktop computer", "electric fan", "fire truck", "grand piano", "hair dryer", "laptop computer", "mountain bike",
    "parking meter", "pickup truck", "school bus", "sunglasses", "traffic light", "vending machine", "window screen", "pizza", "strawberry", "banana",
    "volcano", "toilet paper",
)


def prompts() -> list[str]:
    """Every class in every template."""
    return [template.format(name) for name in CLASSES for template in TEMPLATES]
