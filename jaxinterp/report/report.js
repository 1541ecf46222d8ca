(function () {
  'use strict';
  var body = document.querySelector('.index tbody');
  if (!body) return;
  var pages = document.getElementById('pages');
  var current = null;

  function rows() { return Array.prototype.slice.call(body.rows); }
  function target(row) { return row.querySelector('a').getAttribute('href').slice(1); }

  function show(id, follow) {
    var row = rows().find(function (one) { return target(one) === id; });
    var page = document.getElementById(id);
    if (!row || !page) return false;
    document.querySelectorAll('.feature.on, .index tr.on').forEach(function (one) { one.classList.remove('on'); });
    row.classList.add('on');
    page.classList.add('on');
    current = id;
    var all = rows(), place = all.indexOf(row);
    page.querySelector('.place').textContent = (place + 1) + ' of ' + all.length;
    var pane = document.querySelector('.index');
    var box = row.getBoundingClientRect(), frame = pane.getBoundingClientRect();
    if (box.top < frame.top + 36) pane.scrollTop -= frame.top + 36 - box.top;
    if (box.bottom > frame.bottom) pane.scrollTop += box.bottom - frame.bottom;
    var top = pages.getBoundingClientRect().top;
    if (follow && (top < 0 || top > window.innerHeight * 0.6)) page.scrollIntoView({block: 'start'});
    return true;
  }

  function go(id) {
    if (show(id, true)) history.replaceState(null, '', '#' + id);
  }

  function move(by) {
    var all = rows(), ids = all.map(target), next = ids.indexOf(current) + by;
    if (next >= 0 && next < ids.length) go(ids[next]);
  }

  document.addEventListener('click', function (event) {
    var link = event.target.closest('a[href^="#feature-"], a[data-move]');
    var row = event.target.closest('.index tbody tr');
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    if (link && link.dataset.move) { event.preventDefault(); move(Number(link.dataset.move)); }
    else if (link || row) { event.preventDefault(); go(link ? link.getAttribute('href').slice(1) : target(row)); }
  });

  document.addEventListener('keydown', function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    var box = document.querySelector('.features').getBoundingClientRect();
    if (box.bottom < 0 || box.top > window.innerHeight) return;
    if (event.key === 'ArrowRight' || event.key === 'j') { event.preventDefault(); move(1); }
    if (event.key === 'ArrowLeft' || event.key === 'k') { event.preventDefault(); move(-1); }
  });

  document.querySelectorAll('.index th').forEach(function (head, column) {
    var label = head.querySelector('span'), button = document.createElement('button');
    button.type = 'button';
    button.textContent = label.textContent;
    button.title = 'Sort by ' + label.textContent;
    head.replaceChild(button, label);
    button.addEventListener('click', function () {
      var text = head.dataset.sort === 'text';
      var now = head.getAttribute('aria-sort');
      var down = now ? now === 'ascending' : !text && column > 0;
      document.querySelectorAll('.index th').forEach(function (one) { one.removeAttribute('aria-sort'); });
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      var key = function (row) {
        var value = row.cells[column].dataset.value;
        return text ? row.cells[column].textContent : value === '' ? NaN : Number(value);
      };
      rows().sort(function (a, b) {
        var x = key(a), y = key(b);
        if (!text && (x !== x || y !== y)) return (x !== x) - (y !== y);
        var order = text ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      }).forEach(function (row) { body.appendChild(row); });
      if (current) show(current, false);
    });
  });

  window.addEventListener('hashchange', function () { show(location.hash.slice(1), true); });
  if (!show(location.hash.slice(1), true)) show(target(body.rows[0]), false);
})();
