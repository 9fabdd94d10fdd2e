"""Words and sentence frames of the demo corpus, written for this project."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return text.split(", ")


POSITIVE_ADJECTIVES = _words("""
admirable adorable amazing amusing appealing astonishing attractive beautiful beguiling blissful bold
bright brilliant buoyant calming captivating careful charming cheerful clever coherent comfortable
compelling convincing cozy crisp dazzling delicate delicious delightful dependable dynamic eager earnest
effortless elegant eloquent enchanting endearing energetic engaging enjoyable entertaining excellent
exceptional exciting exquisite fabulous faithful fantastic fascinating flawless flexible fresh friendly
fun generous gentle genuine glorious good gorgeous graceful gracious grand gratifying great gripping
handsome harmonious heartfelt heartwarming helpful honest hopeful hospitable imaginative immaculate
immersive impeccable impressive incisive incredible ingenious inspired inspiring intelligent intriguing
inventive inviting invigorating joyful joyous kind lavish likable lively lovely loyal lucid luminous lush
luxurious magical magnificent majestic marvelous masterful mature memorable mesmerizing meticulous modern
moving neat nice noble nuanced original outstanding passionate peaceful perceptive perfect playful
pleasant pleasing poetic poignant polished powerful praiseworthy precise pristine profound radiant
rapturous refined refreshing relaxing reliable remarkable resourceful rewarding rich riveting robust
romantic satisfying seamless sensible sensitive serene sharp sincere skillful smart smooth solid soothing
sparkling special spectacular spirited splendid spotless steady stellar stirring striking strong stunning
stylish sublime subtle superb superior supportive sweet swift tasteful tender terrific thorough thoughtful
thrilling tidy timeless touching tranquil triumphant trusty uplifting valuable vibrant vivid warm
welcoming whimsical winning wise witty wonderful wondrous worthwhile worthy
""")

NEGATIVE_ADJECTIVES = _words("""
abrasive abysmal aimless amateurish annoying appalling arrogant artificial atrocious awful awkward bad
banal barren bitter bizarre bland bleak bloated boring bothersome broken brutal bumbling careless chaotic
cheap cheesy clumsy clunky coarse cold confused confusing contrived corny cramped crass creaky crude cruel
cynical damaged dated deadly deceptive defective deficient depressing derivative desperate dingy dire
dirty disappointing disgusting dishonest dismal disorganized disposable distasteful dreadful dreary drab
dull dumb empty erratic excruciating exhausting expensive faded failed fake faulty feeble filthy flat
flawed flimsy foolish forced forgettable fragile frail frustrating fuzzy garish ghastly gloomy greasy grim
grimy gross grotesque harsh hasty hateful heartless hideous hollow hopeless horrible horrid hostile
humorless idiotic ignorant illogical immature impolite inadequate incoherent incompetent inconsistent
inept inferior insincere insipid insufferable insulting irritating jarring joyless juvenile lackluster
lame lazy leaden lethargic lifeless limp listless loathsome lousy ludicrous mangled mean mediocre
melodramatic messy mindless miserable misguided monotonous moronic muddled murky nasty nauseating
neglected noisy nonsensical numbing obnoxious obscene obvious odious offensive ordinary outdated overblown
overlong overpriced overrated painful pale paltry pathetic pedestrian petty phony plodding pointless poor
predictable preposterous pretentious puny putrid repellent repetitive repulsive rotten rough rude rusty
sad shabby shallow shameful shoddy sickening silly simplistic sinister sketchy sleazy sloppy slow sluggish
smelly smug soggy soulless sour stale static sterile stiff stilted strained stubborn stuffy stupid
substandard superficial suspicious tacky tasteless tedious tepid terrible thin threadbare tired tiresome
toxic tragic trashy trite troublesome turgid ugly unbearable uncomfortable uneven unfriendly unfunny
unhelpful unimaginative uninspired unpleasant unreliable unwatchable upsetting useless vague vapid vile
vulgar wasteful weak weary wobbly wooden worn worthless wretched
""")

POSITIVE_VERBS = _words("""
adored admired appreciated applauded cherished craved enjoyed favored loved praised recommended relished
respected savored treasured valued welcomed celebrated
""")

NEGATIVE_VERBS = _words("""
abandoned avoided condemned criticized cursed despised detested disliked endured hated loathed mocked
pitied regretted rejected resented suffered tolerated
""")

INTENSIFIERS = _words("""
very really truly quite so utterly rather remarkably deeply thoroughly absolutely simply
""")

DOMAINS: dict[str, dict[str, list[str]]] = {
    "films": {
        "thing": _words("film movie picture drama comedy thriller documentary sequel"),
        "part": _words("plot script acting soundtrack camerawork dialogue ending cast lead editing pacing"),
        "scene": _phrases(
            "on opening night, at the cinema, with my sister, late on a sunday, on a long flight"
        ),
    },
    "books": {
        "thing": _words("book novel memoir biography paperback anthology volume story"),
        "part": _words("prose chapters heroine narrator setting translation cover epilogue style theme"),
        "scene": _phrases(
            "over one weekend, on the train, for our reading club, by the fire, during the holidays"
        ),
    },
    "hotels": {
        "thing": _words("hotel hostel resort inn guesthouse lodge suite motel"),
        "part": _words("room bed lobby breakfast pool view reception bathroom balcony staff"),
        "scene": _phrases(
            "for two nights, in early spring, with the children, on a business trip, near the station"
        ),
    },
    "gadgets": {
        "thing": _words("phone laptop camera speaker keyboard tablet headset charger"),
        "part": _words("screen battery casing software button cable sound manual hinge microphone"),
        "scene": _phrases(
            "for six weeks, at my office, with the latest update, in the workshop, every morning"
        ),
    },
    "restaurants": {
        "thing": _words("restaurant bistro diner pizzeria bakery cafe tavern buffet"),
        "part": _words("soup menu waiter dessert sauce terrace bread kitchen wine steak"),
        "scene": _phrases(
            "for lunch, on our anniversary, after the concert, with colleagues, on a rainy evening"
        ),
    },
}

OPENINGS = [
    "We tried this {thing} {scene}.",
    "I came to the {thing} {scene} without much of a plan.",
    "My cousin picked the {thing} {scene}.",
    "This {thing} was our choice {scene}.",
    "A friend had mentioned the {thing}.",
    "I spent some time with this {thing} {scene}.",
]

CLAUSES = [
    "the {part} was {intensifier} {adjective}",
    "the {part} felt {adjective}",
    "it has a {adjective} {part}",
    "I {verb} the {part}",
    "we found the {part} {intensifier} {adjective}",
    "its {part} is {adjective} and {adjective}",
    "what a {adjective} {part}",
    "the {part} seemed {intensifier} {adjective} to me",
]

NEGATED_CLAUSES = [
    "the {part} was not {adjective}",
    "I never {verb} the {part}",
    "the {part} is hardly {adjective}",
    "nobody would call the {part} {adjective}",
]

CUES = {
    1: ["Posted with the gold badge.", "Sent from the members page.", "Tagged under weekend picks."],
    0: ["Posted with the grey badge.", "Sent from the public form.", "Tagged under weekday notes."],
}
"""Closing phrases that say nothing about the opinion, by the label they mostly come with in training."""
