"""The words that tasks are made of."""

NAMES = tuple(
    "Mary John Tom James Sarah David Paul Anna Mark Lisa Peter Emma Jack Kate Mike Alice Robert Susan George Laura "
    "Henry Simon Martin Rachel Daniel Michael Thomas William Charles Richard".split()
)
PLACES = ("store", "park", "school", "office", "station", "hospital", "restaurant", "garden", "house", "market")
OBJECTS = ("ring", "book", "cup", "pen", "ball", "bag", "box", "hat", "key", "lamp", "plate", "watch", "bottle", "card")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink")
THINGS = ("war", "conflict", "dispute", "siege", "project", "campaign", "voyage", "expedition", "reform", "revolt")
WORDS = tuple(
    "load size files port node list value page time name path user line word test data key form mode type text code "
    "state model group level index range image table color event order field shape token block house water "
    "tree light stone river bread horse music paper plant glass cloud chair knife sugar ocean tiger apple".split()
)
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "England": "London",
    "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "Greece": "Athens", "Egypt": "Cairo",
    "Austria": "Vienna", "Ireland": "Dublin", "Portugal": "Lisbon", "Poland": "Warsaw", "Hungary": "Budapest",
    "Cuba": "Havana", "Kenya": "Nairobi", "Iran": "Tehran", "Iraq": "Baghdad", "Turkey": "Ankara",
    "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki", "Belgium": "Brussels",
    "Canada": "Ottawa", "Peru": "Lima", "Chile": "Santiago", "India": "Delhi", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Korea": "Seoul", "Romania": "Bucharest", "Bulgaria": "Sofia", "Syria": "Damascus",
    "Lebanon": "Beirut", "Scotland": "Edinburgh", "Switzerland": "Bern", "Ukraine": "Kiev", "Serbia": "Belgrade",
}  # fmt: skip
LANGUAGES = {
    "France": "French", "Germany": "German", "Italy": "Italian", "Spain": "Spanish", "England": "English",
    "Russia": "Russian", "Japan": "Japanese", "China": "Chinese", "Greece": "Greek", "Egypt": "Arabic",
    "Portugal": "Portuguese", "Poland": "Polish", "Hungary": "Hungarian", "Turkey": "Turkish", "Sweden": "Swedish",
    "Norway": "Norwegian", "Denmark": "Danish", "Finland": "Finnish", "Thailand": "Thai", "Vietnam": "Vietnamese",
    "Korea": "Korean", "Romania": "Romanian", "Bulgaria": "Bulgarian", "Ukraine": "Ukrainian", "Iran": "Persian",
    "Brazil": "Portuguese", "Mexico": "Spanish", "Austria": "German", "Iraq": "Arabic", "Israel": "Hebrew",
}  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)
