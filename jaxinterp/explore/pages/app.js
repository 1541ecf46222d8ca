// The views: features, your text, steer, compare. The address says which one: #/f/606, #/text, #/steer/606, #/compare.
'use strict';

(async () => {
  const main = document.getElementById('main'), status = document.getElementById('status');
  const state = {kind: 'token', q: '', order: 'density', first: 0, open: null, rows: [], marked: 0, text: '', found: null,
    steer: {prompt: '', strength: 2, seed: 0, temperature: 0, new: 40}, steered: null, pairs: 'most alike', at: 0};
  const SIZE = 100;
  let about, turn = 0;

  const say = text => { status.textContent = text; };
  // Runs one question at a time: an answer that comes after the reader went on is dropped.
  async function asked(what, work) {
    const mine = ++turn;
    say(what + ' …');
    try {
      const found = await work();
      if (mine === turn) say('');
      return mine === turn ? found : undefined;
    } catch (error) { if (mine === turn) say('Error: ' + error.message); return undefined; }
  }

  // ---- features
  async function list() {
    const found = await asked('looking', () => state.q ? Data.search({kind: state.kind, q: state.q})
      : Data.features({order: state.order, first: state.first, count: SIZE}));
    if (!found) return;
    state.rows = found.rows;
    state.marked = Math.max(0, found.rows.findIndex(row => row.i === state.open));
    drawList(found);
  }

  function drawList(found) {
    const holder = document.getElementById('list');
    if (!holder) return;
    const last = Math.min(state.first + SIZE, found.total);
    const turnTo = first => () => { state.first = first; list(); };
    holder.replaceChildren(
      make('p.note', {}, state.q ? `${found.total.toLocaleString('en')} ${found.said}`
        : `${(state.first + 1).toLocaleString('en')}–${last.toLocaleString('en')} of ${found.total.toLocaleString('en')}`),
      make('ol.rows', {}, found.rows.map((row, at) => make('li', {}, rowOf(row, at)))),
      state.q ? '' : make('div.pager', {},
        make('button', {type: 'button', disabled: !state.first, onclick: turnTo(Math.max(0, state.first - SIZE))}, 'Previous'),
        make('button', {type: 'button', disabled: last >= found.total, onclick: turnTo(state.first + SIZE)}, 'Next')));
  }

  function rowOf(row, at) {
    return make('a.row' + (row.i === state.open ? '.open' : '') + (at === state.marked ? '.marked' : ''),
      {href: '#/f/' + row.i, 'data-i': row.i, 'aria-current': row.i === state.open ? 'true' : null},
      make('span.number', {}, '#' + row.i),
      make('span.words' + (row.label ? '.label' : ''), {}, row.label ? visible(row.label) : words(row)),
      make('span.rate', {}, row.score === undefined ? percent(row.density) : num(row.score, 2)));
  }

  function features() {
    const kinds = {token: 'fires on token', text: 'fires on text', raises: 'raises logit of', lowers: 'lowers logit of',
      label: 'label', id: 'number'};
    const box = make('input', {type: 'search', id: 'q', value: state.q, placeholder: 'a word, a text, #606', autocomplete: 'off',
      spellcheck: 'false'});
    const kind = make('select', {id: 'kind', 'aria-label': 'Search by', onchange: () => { state.kind = kind.value; go(); }},
      Object.entries(kinds).map(([value, name]) => make('option', {value, selected: value === state.kind}, name)));
    const order = make('select', {id: 'order', 'aria-label': 'Order', onchange: () => {
      state.order = order.value; state.first = 0; state.q = box.value = ''; list(); }},
      [['density', 'most frequent'], ['largest', 'largest activation'], ['index', 'number']].map(([value, name]) =>
        make('option', {value, selected: value === state.order}, name)));
    const go = () => {
      state.q = box.value;
      if (/^#\d+$/.test(state.q)) { location.hash = '#/f/' + state.q.slice(1); state.q = box.value = ''; return; }
      state.first = 0;
      list();
    };
    const form = make('form.search', {role: 'search', onsubmit: event => { event.preventDefault(); go(); }},
      kind, make('label.sr', {for: 'q'}, 'Search'), box, make('button', {}, 'Search'), order);
    box.addEventListener('input', () => { if (!box.value && state.q) go(); });
    const aside = make('div.side', {}, form, make('div', {id: 'list'}));
    main.replaceChildren(make('div.columns' + (state.open === null ? '' : '.opened'), {}, aside,
      make('article.page', {id: 'page', tabindex: '-1', 'aria-label': 'Feature'})));
  }

  async function open(number) {
    if (!document.getElementById('page')) features();
    state.open = number;
    document.querySelector('.columns').classList.toggle('opened', number !== null);
    mark();
    if (number === null) { document.getElementById('page').replaceChildren(welcome()); return; }
    const page = await asked('reading #' + number, () => Data.feature(number));
    const holder = document.getElementById('page');
    if (!page || !holder) return;
    holder.replaceChildren(make('a.back', {href: '#/'}, '← All features'),
      make('header.feature', {}, make('h2', {}, 'Feature #' + number), facts(page)), labelForm(page), actions(page),
      ...featureCards(page));
    window.scrollTo(0, 0);
    holder.scrollTop = 0;
  }

  function welcome() {
    return make('div.welcome', {}, make('h2', {}, 'Choose a feature'),
      make('p', {}, 'Each line of the list is a feature: its number, the tokens on which it is strongest (or the label you ' +
        'gave it), and on how many tokens it fires. Search for a word to find the features that fire on it.'),
      make('p', {}, 'Press ? for the keys.'));
  }

  function labelForm(page) {
    const box = make('input', {id: 'label', value: page.label, maxlength: 500, autocomplete: 'off',
      placeholder: 'what it fires on, in your words', disabled: Boolean(window.EXPORT)});
    const keep = async event => {
      event.preventDefault();
      const found = await asked('saving', () => Data.label(page.i, box.value));
      if (!found) return;
      box.value = found.label;
      say('Label saved.');
      const row = state.rows.find(one => one.i === page.i);
      if (row) { row.label = found.label; replaceRow(row); }
    };
    if (window.EXPORT && !page.label) return '';
    return make('form.label-form', {onsubmit: keep}, field('Label', box),
      window.EXPORT ? '' : make('button', {}, 'Save'));
  }

  function replaceRow(row) {
    const old = document.querySelector(`.row[data-i="${row.i}"]`);
    if (old) old.replaceWith(rowOf(row, state.rows.indexOf(row)));
  }

  function actions(page) {
    if (!about.live || !page.fired) return '';
    const effect = make('div.effect', {'aria-live': 'polite'}, page.effect ? effectCards(page.effect) : '');
    const measure = async event => {
      const button = event.currentTarget;
      const found = await asked('running the model without it', () => Data.effect(page.i));
      if (found) { effect.replaceChildren(...effectCards(found)); button.remove(); }
    };
    return make('div.actions', {}, make('a.button', {href: '#/steer/' + page.i}, 'Steer with it'),
      page.effect ? '' : make('button', {type: 'button', id: 'ablate', onclick: measure}, 'Ablate it'), effect);
  }

  const effectCards = found => [
    make('p', {}, `Without it the loss of the next token changes by ${num(found.where_fires)} nats where it ` +
      `fires (${found.tokens[0]} tokens), ${num(found.elsewhere)} elsewhere; ${found.windows} windows.`),
    found.raised.length || found.lowered.length ? make('section.card.two', {},
      make('div', {}, make('h3', {}, 'Next tokens it raises'), bars(found.raised, code)),
      make('div', {}, make('h3', {}, 'Next tokens it lowers'), bars(found.lowered, code)),
      make('p.note', {}, 'Through all later layers: the mean change of log-probability where it fires, in nats.')) : '',
    found.heads && found.heads.length ? card('Heads that make it fire', bars(found.heads, name => make('span', {}, 'head ' + name)),
      make('p.note', {}, 'Layer.head: direct part in the pre-activation at its strongest tokens, norms held constant.')) : ''];

  function mark() {
    for (const row of document.querySelectorAll('.row')) {
      const own = Number(row.dataset.i) === state.open;
      row.classList.toggle('open', own);
      if (own) row.setAttribute('aria-current', 'true'); else row.removeAttribute('aria-current');
    }
  }

  // ---- your text
  function text() {
    const box = make('textarea', {id: 'own', rows: 4, spellcheck: 'false'});
    box.value = state.text;
    const form = make('form.card', {onsubmit: async event => {
      event.preventDefault();
      state.text = box.value;
      const found = await asked('running the model', () => Data.text(box.value));
      if (found) { state.found = {...found, token: null}; drawText(); }
    }}, field('Your text', box), make('div.actions', {}, make('button', {}, 'Show what fires'),
      make('span.note', {}, 'Ctrl+Enter; the first time the model is loaded')));
    main.replaceChildren(make('div.single', {}, make('h2', {}, 'Your text, token by token'), form, make('div', {id: 'fires'})));
    drawText();
  }

  function drawText() {
    const holder = document.getElementById('fires'), found = state.found;
    if (!holder || !found) return;
    const strongest = found.tokens.map((_, at) => Math.max(0, ...found.fires[at].map(pair => pair[1])));
    const pick = {now: found.token, choose: at => { found.token = at; drawText(); }};
    const at = found.token;
    holder.replaceChildren(
      card('Tokens', make('p.note', {}, 'Shaded by the strongest feature; choose a token to see what fires on it.'),
        heated(found.tokens, strongest, {pick})),
      at === null ? '' : card(`On token ${at}`, make('p', {}, code(found.tokens[at])),
        found.fires[at].length ? bars(found.fires[at], i => make('span', {}, link(i), ' ', words(found.rows[i]))) : 'Nothing fires.'),
      card('Strongest features of the text', ...found.features.map(one => make('div.fired', {},
        make('p', {}, link(one.i), ' ', make('span.note', {}, visible(words(found.rows[one.i])))),
        heated(found.tokens, one.values)))));
  }

  // ---- steer
  function steer(number) {
    const now = state.steer;
    if (number !== null) now.i = number;
    const prompt = make('textarea', {id: 'prompt', rows: 3, spellcheck: 'false'});
    prompt.value = now.prompt;
    const slider = make('input', {type: 'range', id: 'strength', min: -20, max: 20, step: 0.5, value: now.strength});
    const shown = make('output', {for: 'strength'}, num(now.strength));
    slider.addEventListener('input', () => { shown.textContent = num(Number(slider.value)); });
    const input = (id, given) => make('input', {id, type: 'number', ...given});
    const which = input('which', {min: 0, max: about.features - 1, value: now.i ?? 0, required: true});
    const seed = input('seed', {min: 0, max: 2147483647, value: now.seed, required: true});
    const heat = input('temperature', {min: 0, max: 5, step: 0.1, value: now.temperature, required: true});
    const length = input('new', {min: 1, max: 128, value: now.new, required: true});
    const form = make('form.card', {onsubmit: async event => {
      event.preventDefault();
      Object.assign(now, {i: Number(which.value), prompt: prompt.value, strength: Number(slider.value),
        seed: Number(seed.value), temperature: Number(heat.value), new: Number(length.value)});
      const found = await asked('generating twice', () => Data.steer(now));
      if (found) { state.steered = found; drawSteered(); }
    }}, field('Prompt', prompt), make('div.numbers', {}, field('Feature', which),
      field('Strength, × its largest activation', slider, shown), field('New tokens', length),
      field('Temperature', heat), field('Seed', seed)),
      make('div.actions', {}, make('button', {}, 'Generate'), make('span.note', {}, 'Ctrl+Enter')));
    main.replaceChildren(make('div.single', {}, make('h2', {}, 'Steer'), make('p.note', {}, 'Adds the feature’s write ' +
      'vector at every token, of the prompt too. With a temperature, both continuations draw with the same seed.'), form,
      make('div', {id: 'out'})));
    drawSteered();
  }

  function drawSteered() {
    const holder = document.getElementById('out'), found = state.steered;
    if (!holder || !found) return;
    const side = (title, text, next) => make('section.card', {}, make('h3', {}, title), make('p.generated', {}, visibleText(text)),
      make('h4', {}, 'Next token'), bars(next, code));
    holder.replaceChildren(make('p.kl', {}, 'KL ', make('b', {}, num(found.kl)), ' nats on the next token; the most probable one ' +
      (found.agrees ? 'is the same.' : 'is another.')),
      make('div.pair', {}, side('As it is', found.plain, found.before), side('Steered', found.steered, found.after)));
  }
  const visibleText = text => text.split('\n').flatMap((line, at) => at ? [make('br'), visible(line)] : [visible(line)]);

  // ---- compare
  async function compare(number) {
    const order = make('select', {'aria-label': 'Order', onchange: () => { state.pairs = order.value; state.at = 0; compare(null); }},
      ['most alike', 'least alike', 'index'].map(name => make('option', {value: name, selected: name === state.pairs}, name)));
    const found = await asked('comparing', () => Data.compare({order: state.pairs, first: state.at}));
    if (!found) return;
    const other = about.other;
    const turnTo = first => () => { state.at = first; compare(null); };
    main.replaceChildren(make('div.single', {}, make('h2', {}, 'Two dictionaries side by side'),
      make('p.note', {}, `Ours: ${about.kind}, ${about.features} features. Other: ${other.kind}, ${other.features}. ` +
        'For each of ours, the other one’s feature with the largest cosine of write vectors; = where the choice is mutual.'),
      order, make('ol.rows.pairs', {}, found.rows.map(pair => make('li', {},
        make('button.pairing', {type: 'button', 'data-ours': pair.ours.i, onclick: () => both(pair)},
          make('span', {}, '#' + pair.ours.i + ' ', visible(words(pair.ours))),
          make('b', {}, (pair.mutual ? '= ' : '') + num(pair.cosine)),
          make('span', {}, '#' + pair.theirs.i + ' ', visible(words(pair.theirs))))))),
      make('div.pager', {},
        make('button', {type: 'button', disabled: !state.at, onclick: turnTo(Math.max(0, state.at - 50))}, 'Previous'),
        make('button', {type: 'button', disabled: state.at + 50 >= found.total, onclick: turnTo(state.at + 50)}, 'Next')),
      make('div.pair', {id: 'both', tabindex: '-1'})));
  }

  async function both(pair) {
    const found = await asked('reading both', () => Promise.all([Data.feature(pair.ours.i), Data.other(pair.theirs.i)]));
    if (!found) return;
    const holder = document.getElementById('both');
    holder.replaceChildren(...found.map((page, at) => make('article', {},
      make('header.feature', {}, make('h2', {}, (at ? 'Other #' : 'Ours #') + page.i), facts(page)),
      ...featureCards(page, {own: !at}))));
    holder.scrollIntoView();
    holder.focus({preventScroll: true});
  }

  // ---- where we are
  async function route() {
    const [, view = '', number] = location.hash.split('/');
    const i = /^\d+$/.test(number || '') && Number(number) < about.features ? Number(number) : null;
    for (const one of document.querySelectorAll('#nav a'))
      if (one.dataset.view === (view === 'f' ? '' : view)) one.setAttribute('aria-current', 'page');
      else one.removeAttribute('aria-current');
    if (view === 'text' && about.live) text();
    else if (view === 'steer' && about.live) steer(i);
    else if (view === 'compare' && about.other) await compare(i);
    else {
      const fresh = !document.getElementById('list');
      if (fresh) { state.open = i; features(); await list(); }
      await open(view === 'f' ? i : null);
    }
  }

  function keys(event) {
    const at = event.target, typing = at.matches('input, textarea, select');
    if (event.key === 'Escape' && typing) { at.blur(); return; }
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && at.form) { event.preventDefault(); at.form.requestSubmit(); return; }
    if (typing || event.ctrlKey || event.metaKey || event.altKey || document.getElementById('help').open) return;
    const rows = document.querySelectorAll('.row'), focus = id => document.getElementById(id)?.focus();
    const act = {
      '/': () => { if (!document.getElementById('q')) { location.hash = '#/'; setTimeout(() => focus('q'), 50); } else focus('q'); },
      'j': () => step(1), 'k': () => step(-1), 'l': () => focus('label'),
      's': () => { if (about.live && state.open !== null) location.hash = '#/steer/' + state.open; },
      't': () => { if (about.live) location.hash = '#/text'; }, 'f': () => { location.hash = '#/'; },
      'c': () => { if (about.other) location.hash = '#/compare'; },
      '?': () => document.getElementById('help').showModal(),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
    function step(by) {
      if (!rows.length) return;
      rows[state.marked]?.classList.remove('marked');
      state.marked = Math.min(Math.max(state.marked + by, 0), rows.length - 1);
      rows[state.marked].classList.add('marked');
      rows[state.marked].focus();
    }
  }

  about = await asked('opening', () => Data.about());
  if (!about) return;
  document.getElementById('title').textContent = visible(about.model);
  document.title = about.model + ', ' + about.writes + ': explorer';
  document.getElementById('what').textContent = `${about.writes}, ${about.features.toLocaleString('en')} features, ` +
    `${num(about.l0)} fire on a token; ${about.tokens.toLocaleString('en')} held-out tokens`;
  const views = [['', 'Features'], ...(about.live ? [['text', 'Your text'], ['steer', 'Steer']] : []),
    ...(about.other ? [['compare', 'Compare']] : [])];
  document.getElementById('nav').replaceChildren(
    ...views.map(([view, name]) => make('a', {href: '#/' + view, 'data-view': view}, name)),
    make('button', {type: 'button', 'aria-label': 'Keys', onclick: () => document.getElementById('help').showModal()}, '?'));
  window.addEventListener('hashchange', route);
  document.addEventListener('keydown', keys);
  await route();
  document.documentElement.dataset.ready = 'true';
})();
