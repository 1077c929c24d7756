"""General English text, written for this project, on which forgetting is measured: the loss before and after training.

It is of several kinds, and of none that people usually fine-tune for, so that what a model loses on it is what it knew
of the language. Some 490 words: too few to compare two models by, enough to compare one with itself.
"""

TEXTS = (
    "A lighthouse is a tower that carries a strong light, built where ships must be warned of rocks or shown the "
    "way into a harbour. The oldest ones burned wood or coal in open fires, which wind and rain put out just when"
    " they were needed most. Oil lamps behind glass followed, then lenses made of rings of prisms, which gather "
    "the light of a small flame into a beam that can be seen for twenty miles. Each lighthouse has a rhythm of "
    "its own: so many flashes, so many seconds of darkness. A sailor who counts them knows where on the chart he "
    "is. Today most of the lights are switched on and off by a computer, and nobody climbs the stairs at dusk any"
    " more.",
    '"You are late," said the baker without looking up. "The bread was ready at six."\n'
    '"The road was flooded," the girl answered. "I had to walk around by the mill."\n'
    "He wiped his hands on his apron and looked at her shoes, which were full of mud. Then he cut a thick slice "
    'from the loaf, put butter on it, and pushed it across the table. "Eat first," he said. "The customers can '
    'wait. They have never walked around by the mill."',
    "To plant a young tree, dig a hole twice as wide as its roots and just as deep. Loosen the soil at the "
    "bottom, so that the roots can grow into it. Set the tree upright, fill the hole with the earth that you took"
    " out, and press it down with your foot. Drive a stake into the ground beside the trunk and tie them "
    "together, not too tightly: a tree that moves a little in the wind grows stronger. Give it two buckets of "
    "water at once, and another one each week until the autumn.",
    "Last summer the town counted its visitors for the first time. There were 41,200 of them between May and "
    "September, nearly three for every inhabitant. Most came for a single day. The council had expected them to "
    "spend their money in the restaurants on the market square, but the survey shows that the museum of clocks, "
    "the smallest in the county, was what people remembered. The mayor has promised it a new roof. Whether there "
    "will be enough money for the swimming pool, too, is to be decided in November.",
    "Water expands when it freezes, which is unusual: nearly everything else shrinks as it becomes colder. In ice"
    " each molecule is held by four neighbours, at angles that leave a good deal of empty space between them. "
    "When ice melts, some of these bonds break and the molecules move closer together. That is why ice floats. If"
    " it sank, lakes would freeze from the bottom up, and few fish would live through a hard winter. It is also "
    "why a full bottle that is forgotten in the freezer breaks, and why roads have holes in spring.",
)
