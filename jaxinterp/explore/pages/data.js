// Where the pages get their data: the server, or files that are loaded as scripts when they are needed.
// An export sets window.EXPORT before this file; its scripts call explorerData(name, value).
'use strict';

const Data = (() => {
  const ROWS = 500, PAGES = 32;
  const shards = new Map(), waiting = new Map();

  async function answer(response) {
    let found;
    try { found = await response.json(); } catch { throw new Error('the server sent no answer (status ' + response.status + ').'); }
    if (!response.ok) throw new Error(found.error || 'status ' + response.status);
    return found;
  }

  async function ask(name, words, body) {
    const query = new URLSearchParams(words || {}).toString();
    const options = body === undefined ? {} :
      {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body)};
    let response;
    try { response = await fetch('api/' + name + (query ? '?' + query : ''), options); }
    catch { throw new Error('the server does not answer: is it still running?'); }
    return answer(response);
  }

  function shard(name) {
    if (!shards.has(name)) shards.set(name, new Promise((done, fail) => {
      waiting.set(name, done);
      const script = document.createElement('script');
      script.src = 'data/' + name + '.js';
      script.onerror = () => fail(new Error('the file data/' + name + '.js is missing.'));
      document.head.append(script);
    }));
    return shards.get(name);
  }
  window.explorerData = (name, value) => { const done = waiting.get(name); if (done) done(value); };

  const number = n => String(n).padStart(5, '0');
  const rowOf = async i => (await shard('rows-' + number(Math.floor(i / ROWS))))[i % ROWS];

  const server = {
    about: () => ask('about'),
    features: words => ask('features', words),
    search: words => ask('search', words),
    feature: i => ask('feature', {i}),
    other: i => ask('other', {i}),
    compare: words => ask('compare', words),
    effect: i => ask('effect', null, {i}),
    text: text => ask('text', null, {text}),
    steer: body => ask('steer', null, body),
    label: (i, label) => ask('label', null, {i, label}),
  };

  const files = {
    about: async () => window.EXPORT,
    async features({order, first, count}) {
      const total = window.EXPORT.features;
      const order_ = order === 'index' ? null : (await shard('orders'))[order];
      const places = [];
      for (let at = first; at < Math.min(first + count, total); at++) places.push(order_ ? order_[at] : at);
      return {total, first, rows: await Promise.all(places.map(rowOf))};
    },
    async search({kind, q}) {
      const wanted = q.trim().toLowerCase(), rows = [];
      if (kind === 'id') {
        const i = Number(q.replace('#', ''));
        if (!Number.isInteger(i) || i < 0 || i >= window.EXPORT.features) throw new Error('no feature ' + q + '.');
        return {total: 1, rows: [await rowOf(i)], said: 'the feature of this number'};
      }
      const field = {token: 'peaks', raises: 'raised', label: 'label'}[kind];
      if (!field) throw new Error('this search needs the server: jaxinterp explore RUN.');
      for (let s = 0; s * ROWS < window.EXPORT.features && rows.length < 50; s++)
        for (const row of await shard('rows-' + number(s)))
          if (kind === 'label' ? row.label.toLowerCase().includes(wanted) :
            row[field].some(token => token.trim().toLowerCase() === wanted)) rows.push(row);
      return {total: rows.length, rows, said: kind === 'label' ? 'features whose label contains this'
        : 'features with it among their three strongest tokens (an export knows no more)'};
    },
    async feature(i) { return (await shard('features-' + number(Math.floor(i / PAGES))))[i % PAGES]; },
  };

  return window.EXPORT ? files : server;
})();
