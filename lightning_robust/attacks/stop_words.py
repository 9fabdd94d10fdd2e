"""English words that carry grammar rather than content, and that attacks leave alone."""

from __future__ import annotations

# One paragraph for each part of speech; contractions stand whole and as tokenizers split them.
_WORDS = """
a an the this that these those some any no every each either neither both all few many much several
such another other own same

i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves one ones who whom whose which
what whoever whatever whichever

am is are was were be been being have has had having do does did doing done can could may might must
shall should will would ought need

about above across after against along among around as at before behind below beneath beside between
beyond by down during for from in inside into near of off on onto out outside over per since through
throughout till to toward towards under until up upon via with within without

and but or nor so yet if unless while whereas although though because than whether

again also already always even ever further here just more most never not now often once only quite
rather still then there thus too very when whenever where wherever why how however

i'm i've i'd i'll you're you've you'd you'll he's he'd he'll she's she'd she'll it's it'd it'll
we're we've we'd we'll they're they've they'd they'll that's that'll there's here's what's who's
let's ain't aren't isn't wasn't weren't haven't hasn't hadn't don't doesn't didn't can't cannot
couldn't mightn't mustn't needn't shan't shouldn't won't wouldn't should've s t d ll m re ve n't
"""

STOP_WORDS: frozenset[str] = frozenset(_WORDS.split())
